"""The conditional diffusion model: U-Net, weights of guided-diffusion, noise, and its moving average."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..engine import load_weights
from ..errors import UsageError
from .config import Diffusion, UNet


def make_unet(config: UNet, size: int, channels: int, classes: int | None) -> UNet2DModel:
    """guided-diffusion's U-Net: 124.06 M at the defaults with 4 channels in and 8 out.

    Args:
        size: side of the images, a multiple of 2^(levels − 1).
        channels: of the images and of the predicted noise.
        classes: `None`: not conditional.
    """
    levels = len(config.multipliers)
    if size % 2 ** (levels - 1):
        raise UsageError(f"data.size: expected a multiple of {2 ** (levels - 1)} for a U-Net of {levels} levels, got {size}")
    there = [size >> level in config.attention for level in range(levels)]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.base * m for m in config.multipliers),
        layers_per_block=config.blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in there),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(there)),
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=config.groups,
        attention_head_dim=config.head,
        norm_num_groups=config.groups,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=classes,
    )


def make_schedule(timesteps: int) -> DDPMScheduler:
    """Linear betas as in guided-diffusion: 1e-4 … 0.02 at 1000 steps, scaled for other numbers of steps."""
    scale = 1000 / timesteps
    return DDPMScheduler(timesteps, beta_start=1e-4 * scale, beta_end=0.02 * scale, beta_schedule="linear", clip_sample=False)


class DiffusionModel(nn.Module):
    """The U-Net and its exponential moving average, whose weights are the ones to use.

    `forward(noisy [B, C, S, S], t [B], label [B])` → predicted noise.
    """

    def __init__(self, config: Diffusion, size: int, channels: int):
        super().__init__()
        self.config = config
        self.unet = make_unet(config.unet, size, channels, 2 if config.conditional else None)
        if config.weights is not None:
            load_diffusion(self.unet, Path(config.weights))
        self.average = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.average.requires_grad_(False)

    def forward(self, noisy: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return predict_noise(self.unet, noisy, t, label if self.config.conditional else None)

    def follow(self) -> None:
        """Moves the average towards the weights; after each optimiser step."""
        self.average.update_parameters(self.unet)

    @property
    def trained(self) -> UNet2DModel:
        return self.average.module


def predict_noise(unet: UNet2DModel, noisy: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    return unet(noisy, t, class_labels=label).sample


def denoising_loss(model: nn.Module, schedule: DDPMScheduler, image: Tensor, label: Tensor) -> Tensor:
    """E ‖ε − ε̂(x_t, t, y)‖², t uniform."""
    t = torch.randint(0, schedule.config.num_train_timesteps, (len(image),), device=image.device)
    noise = torch.randn_like(image)
    return F.mse_loss(model(schedule.add_noise(image, noise, t), t, label).float(), noise)


def load_diffusion(unet: UNet2DModel, file: Path) -> None:
    """Weights of guided-diffusion (`256x256_diffusion.pt`) or of diffusers. Of learned variances only the mean's half is kept.

    Raises:
        UsageError: weights that do not fit.
    """
    state = load_weights(file)
    if "input_blocks.0.0.weight" in state:
        state = from_guided(state, unet)
    out = unet.conv_out.weight.shape[0]
    for name in ("conv_out.weight", "conv_out.bias"):
        if name in state and state[name].shape[0] == 2 * out:
            state[name] = state[name][:out]
    try:
        unet.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"diffusion.weights {file}: does not fit the U-Net ({str(error).rpartition(chr(10))[2].strip()})") from None


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _places(unet: UNet2DModel) -> dict[str, str]:
    """Where each block of guided-diffusion stands in diffusers: "input_blocks.1.0" → "down_blocks.0.resnets.0"."""
    places, n = {}, 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            n += 1
            places[f"input_blocks.{n}.0"] = f"down_blocks.{i}.resnets.{j}"
            if hasattr(block, "attentions"):
                places[f"input_blocks.{n}.1"] = f"down_blocks.{i}.attentions.{j}"
        if block.downsamplers:
            n += 1
            places[f"input_blocks.{n}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
    places |= {"middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0", "middle_block.2": "mid_block.resnets.1"}
    n = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            places[f"output_blocks.{n}.0"] = f"up_blocks.{i}.resnets.{j}"
            last = 1
            if hasattr(block, "attentions"):
                places[f"output_blocks.{n}.1"] = f"up_blocks.{i}.attentions.{j}"
                last = 2
            if block.upsamplers and j == len(block.resnets) - 1:
                places[f"output_blocks.{n}.{last}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
            n += 1
    return places


def from_guided(state: dict[str, Tensor], unet: UNet2DModel) -> dict[str, Tensor]:
    """guided-diffusion's names and layout → diffusers'. Attention's qkv lies per head (the legacy order): q, k, v of head 0, …

    Raises:
        UsageError: a name that has no place in this U-Net.
    """
    places = {**_places(unet), **_ENDS}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in places:
            found[f"{places[module]}.{kind}"] = tensor
            continue
        block = next((b for b in places if module.startswith(f"{b}.")), None)
        if block is None:
            raise UsageError(f"guided-diffusion weights: {name} has no place in this U-Net (levels, blocks, attention or classes differ)")
        part, home = module[len(block) + 1 :], places[block]
        if part in _RESNET:
            found[f"{home}.{_RESNET[part]}.{kind}"] = tensor
        elif part == "norm":
            found[f"{home}.group_norm.{kind}"] = tensor
        elif part == "proj_out":
            found[f"{home}.to_out.0.{kind}"] = tensor.flatten(1) if kind == "weight" else tensor
        elif part == "qkv":
            heads = unet.get_submodule(home).heads
            flat = tensor.flatten(1) if kind == "weight" else tensor
            per_head = flat.reshape(heads, 3, -1, *flat.shape[1:])
            for i, letter in enumerate("qkv"):
                found[f"{home}.to_{letter}.{kind}"] = per_head[:, i].reshape(-1, *flat.shape[1:]).clone()
        else:
            raise UsageError(f"guided-diffusion weights: {name} has no place in this U-Net")
    return found

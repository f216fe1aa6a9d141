"""The external classifier on noisy images, and the gradient maps of its answer (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..engine.stream import derive
from .config import NoisyClassifier, UNet
from .diffusion import make_unet


class EncoderClassifier(nn.Module):
    """The encoder half of the diffusion U-Net with its time embedding, and a linear layer on the mean of its map.

    47.6 M at the defaults. `forward(noisy [B, C, S, S], t [B])` → logits `Tensor[B, 2]` of absent and present.
    """

    def __init__(self, config: UNet, size: int, channels: int):
        super().__init__()
        unet = make_unet(config, size, channels, None)
        width = config.base * config.multipliers[-1]
        self.conv_in, self.time_proj, self.time_embedding = unet.conv_in, unet.time_proj, unet.time_embedding
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        self.norm, self.head = nn.GroupNorm(config.groups, width), nn.Linear(width, 2)

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        embedding = self.time_embedding(self.time_proj(t).to(noisy.dtype))
        x = self.conv_in(noisy)
        for block in self.down_blocks:
            x, _ = block(hidden_states=x, temb=embedding)
        x = self.mid_block(x, embedding)
        return self.head(nn.functional.silu(self.norm(x)).mean((2, 3)))


def noisy_loss(model: nn.Module, schedule: DDPMScheduler, image: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Cross-entropy on x_t, t uniform, and the accuracy."""
    t = torch.randint(0, schedule.config.num_train_timesteps, (len(image),), device=image.device)
    logit = model(schedule.add_noise(image, torch.randn_like(image), t), t).float()
    return {"loss": nn.functional.cross_entropy(logit, label), "accuracy": (logit.argmax(1) == label).float().mean()}


def min_max(maps: Tensor) -> Tensor:
    """`Tensor[B, S, S]` → 0 … 1 for each map; a constant map becomes zeros."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-7)


@torch.enable_grad()
def gradient_maps(
    model: nn.Module, schedule: DDPMScheduler, image: Tensor, names: Sequence[str], config: NoisyClassifier, seed: int
) -> Tensor:
    """`∂ log p(present | x_t, t) / ∂ x_t`, averaged over channels and timesteps, `Tensor[B, S, S]` in 0 … 1.

    The noise depends on the image's name and the timestep alone.
    """
    total = torch.zeros_like(image[:, 0])
    for t in config.timesteps:
        noise = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(derive(seed, "gradient", n, t)))
            for n, x in zip(names, image, strict=True)
        ]
        times = torch.full((len(image),), t, device=image.device)
        noisy = schedule.add_noise(image, torch.stack(noise).to(image), times).requires_grad_()
        present = model(noisy, times).float().log_softmax(1)[:, 1].sum()
        (gradient,) = torch.autograd.grad(present, noisy)
        gradient = {"absolute": gradient.abs(), "positive": gradient.relu(), "raw": gradient}[config.sign]
        total += gradient.mean(1) / len(config.timesteps)
    return min_max(total.detach())

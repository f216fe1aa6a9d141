"""Diffusion features: activations of the decoder of the frozen U-Net on noisy copies of an image (section 3.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ..engine.stream import derive
from ..errors import UsageError
from .config import Features
from .diffusion import predict_noise


def layer_names(unet: UNet2DModel, layers: Sequence[str]) -> list[str]:
    """The modules whose outputs are features.

    Empty: the last residual or attention block of every decoder level, before its upsampler. `("all",)`: every block.
    Otherwise names of modules of the U-Net.

    Raises:
        UsageError: a name that it does not have.
    """
    blocks = [
        [f"up_blocks.{i}.{'attentions' if hasattr(block, 'attentions') else 'resnets'}.{j}" for j in range(len(block.resnets))]
        for i, block in enumerate(unet.up_blocks)
    ]
    if not layers:
        return [level[-1] for level in blocks]
    if tuple(layers) == ("all",):
        return [name for level in blocks for name in level]
    known = dict(unet.named_modules())
    for name in layers:
        if name not in known:
            raise UsageError(
                f"features.layers: the U-Net has no module {name!r}; its decoder's blocks are {', '.join(name for level in blocks for name in level)}"
            )
    return list(layers)


@contextlib.contextmanager
def _listening(unet: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named modules in the next forward pass."""
    heard: dict[str, Tensor] = {}

    def listen(name: str):
        def hook(module, inputs, output):
            heard[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [unet.get_submodule(name).register_forward_hook(listen(name)) for name in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


class Extractor:
    """Images → feature maps of each layer, for every timestep or averaged over them.

    The noise depends on the image's name and the timestep alone, so that features are the same in every run and process.
    """

    def __init__(self, unet: UNet2DModel, schedule: DDPMScheduler, config: Features, seed: int):
        self.unet, self.schedule, self.config, self.seed = unet.eval().requires_grad_(False), schedule, config, seed
        self.names = layer_names(unet, config.layers)
        wrong = [t for t in config.timesteps if not 0 <= t < schedule.config.num_train_timesteps]
        if wrong or not config.timesteps:
            raise UsageError(f"features.timesteps: expected numbers in 0…{schedule.config.num_train_timesteps - 1}, got {config.timesteps}")

    def condition(self, label: Tensor) -> Tensor | None:
        """What the U-Net is told of images with these labels."""
        if self.unet.class_embedding is None:
            return None
        constant = {"positive": 1, "negative": 0}.get(self.config.condition)
        return label if constant is None else torch.full_like(label, constant)

    def noise(self, name: str, t: int, image: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(derive(self.seed, "noise", name, t))
        return torch.randn(image.shape, generator=generator).to(image)

    @torch.no_grad()
    def at(self, image: Tensor, names: Sequence[str], label: Tensor, t: int) -> list[Tensor]:
        """`Tensor[B, C, S, S]` → a map `Tensor[B, C_l, h_l, w_l]` of each layer at timestep t."""
        noise = torch.stack([self.noise(name, t, x) for name, x in zip(names, image, strict=True)])
        times = torch.full((len(image),), t, device=image.device)
        with _listening(self.unet, self.names) as heard:
            predict_noise(self.unet, self.schedule.add_noise(image, noise, times), times, self.condition(label))
        return [heard[name] for name in self.names]

    def every(self, image: Tensor, names: Sequence[str], label: Tensor) -> list[Tensor]:
        """`Tensor[B, T, C_l, h_l, w_l]` of each layer: all timesteps, as the literal form of the decoder takes them."""
        steps = [self.at(image, names, label, t) for t in self.config.timesteps]
        return [torch.stack(maps, dim=1) for maps in zip(*steps, strict=True)]

    def mean(self, image: Tensor, names: Sequence[str], label: Tensor) -> list[Tensor]:
        """`Tensor[B, C_l, h_l, w_l]` of each layer, averaged over the timesteps, one of which is in memory at a time."""
        total: list[Tensor] = []
        for t in self.config.timesteps:
            maps = self.at(image, names, label, t)
            total = [a.add_(b) for a, b in zip(total, maps, strict=True)] if total else [m.clone() for m in maps]
        return [m.div_(len(self.config.timesteps)) for m in total]

    def channels(self, size: int) -> list[int]:
        """Channels of each layer."""
        device = next(self.unet.parameters()).device
        image = torch.zeros(1, self.unet.config.in_channels, size, size, device=device)
        return [m.shape[1] for m in self.at(image, [""], torch.zeros(1, dtype=torch.long, device=device), self.config.timesteps[0])]

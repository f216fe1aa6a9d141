"""Healthy counterparts G(X): a GANomaly-style generator that only ever sees images without lesions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UsageError
from .config import Generator


def _encoder(config: Generator, out: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, config.width, 4, 2, 1), nn.LeakyReLU(0.2)]
    side, width = config.size // 2, config.width
    while side > 4:
        layers += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)]
        side, width = side // 2, 2 * width
    return nn.Sequential(*layers, nn.Conv2d(width, out, 4))


def _decoder(config: Generator) -> nn.Sequential:
    width = config.width * config.size // 8
    layers: list[nn.Module] = [nn.ConvTranspose2d(config.latent, width, 4, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    side = 4
    while side < config.size // 2:
        layers += [nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU()]
        side, width = side * 2, width // 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Sigmoid())


class Ganomaly(nn.Module):
    """Encoder → latent → decoder → image → second encoder, against a discriminator.

    `forward(image [B, 1, S, S] in 0 … 1)` → the losses of one step. Generator and discriminator are trained by one sum: the
    generator's part does not reach the discriminator's weights, nor the discriminator's part the generator's.
    """

    def __init__(self, config: Generator):
        super().__init__()
        if config.size < 16 or config.size & (config.size - 1):
            raise UsageError(f"generator.size: expected a power of two of at least 16, got {config.size}")
        self.config = config
        self.encoder, self.decoder, self.second = _encoder(config, config.latent), _decoder(config), _encoder(config, config.latent)
        self.discriminator = _encoder(config, 1)

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image))

    def _judge(self, image: Tensor, *, frozen: bool) -> tuple[Tensor, Tensor]:
        """Features before the last layer, and the logit of being real."""
        body, last = self.discriminator[:-1], self.discriminator[-1]
        if not frozen:
            features = body(image)
            return features, last(features).flatten()
        weights = {name: p.detach() for name, p in body.named_parameters()}
        buffers = {name: b.clone() for name, b in body.named_buffers()}  # its statistics follow the discriminator's own passes alone
        return functional_call(body, {**weights, **buffers}, (image,)), image.new_zeros(len(image))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        latent = self.encoder(image)
        made = self.decoder(latent)
        context = F.l1_loss(made, image)
        encoded = F.mse_loss(self.second(made), latent)
        with torch.no_grad():
            target, _ = self._judge(image, frozen=True)
        matched = F.mse_loss(self._judge(made, frozen=True)[0], target)
        real, fake = self._judge(image, frozen=False)[1], self._judge(made.detach(), frozen=False)[1]
        judged = F.binary_cross_entropy_with_logits(real, torch.ones_like(real)) + F.binary_cross_entropy_with_logits(
            fake, torch.zeros_like(fake)
        )
        c = self.config
        total = c.context * context + c.encoder * encoded + c.adversarial * matched + judged / 2
        return {"loss": total, "context": context, "encoder": encoded, "adversarial": matched, "discriminator": judged}

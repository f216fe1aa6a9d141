"""Eager baselines of `par`, SPEC section 1 (M4 Eq. 3.17, variant "par"), written from the equations.

`eager` follows the algorithm of the released refinement module: every shifted copy is one channel of a dilated
convolution with a one-hot kernel. `pad_and_slice` is the best eager rewrite we know: one padded tensor, shifts are
views, nothing of 48 planes per class is stored. Both take masks that already have the image's size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
W1 = W2 = 0.3
W3 = 0.01


def _one_hot_kernels(like: Tensor) -> Tensor:
    kernels = like.new_zeros(len(DIRECTIONS), 1, 3, 3)
    for index, (dy, dx) in enumerate(DIRECTIONS):
        kernels[index, 0, dy + 1, dx + 1] = 1
    return kernels


def _neighbours(x: Tensor, dilations) -> Tensor:
    """Tensor[B, C, H, W] -> Tensor[B, C, 8 * len(dilations), H, W]"""
    batch, channels, height, width = x.shape
    kernels = _one_hot_kernels(x)
    found = []
    for d in dilations:
        padded = F.pad(x, [d] * 4, mode="replicate").reshape(batch * channels, 1, height + 2 * d, width + 2 * d)
        found.append(F.conv2d(padded, kernels, dilation=d).reshape(batch, channels, len(DIRECTIONS), height, width))
    return torch.cat(found, dim=2)


def _position_weights(like: Tensor, dilations) -> Tensor:
    """The constant second softmax, Tensor[1, 1, P, 1, 1]."""
    distance = torch.tensor(
        [d * (dy * dy + dx * dx) ** 0.5 for d in dilations for dy, dx in DIRECTIONS], dtype=torch.float64, device=like.device
    )
    logit = -((distance / (distance.std() + 1e-8) / W2) ** 2)
    return logit.softmax(0).to(like).reshape(1, 1, -1, 1, 1)


def eager(image: Tensor, mask: Tensor, dilations, num_iter: int) -> Tensor:
    """Tensor[B, Q, H, W], Tensor[B, C, H, W] -> Tensor[B, C, H, W]"""
    around = _neighbours(image, dilations)
    centre = image.unsqueeze(2).repeat(1, 1, around.shape[2], 1, 1)
    deviation = around.std(dim=2, keepdim=True)
    logit = (-(((around - centre).abs() / (deviation + 1e-8) / W1) ** 2)).mean(dim=1, keepdim=True)
    weight = logit.softmax(dim=2) + W3 * _position_weights(image, dilations)
    for _ in range(num_iter):
        mask = (_neighbours(mask, dilations) * weight).sum(2)
    return mask


def _shifts(x: Tensor, dilations):
    """The shifted views, in the order of `_neighbours`."""
    height, width = x.shape[-2:]
    reach = max(dilations)
    padded = F.pad(x, [reach] * 4, mode="replicate")
    for d in dilations:
        for dy, dx in DIRECTIONS:
            top, left = reach + dy * d, reach + dx * d
            yield padded[..., top : top + height, left : left + width]


def pad_and_slice(image: Tensor, mask: Tensor, dilations, num_iter: int) -> Tensor:
    """The same map without the copies."""
    around = torch.stack(list(_shifts(image, dilations)), dim=2)
    scale = 1 / ((around.std(dim=2, keepdim=True) + 1e-8) * W1)
    logit = -(around.sub_(image.unsqueeze(2)).mul_(scale).square_().mean(dim=1))
    weight = logit.softmax(dim=1).add_(W3 * _position_weights(image, dilations)[:, 0])
    for _ in range(num_iter):
        refined = torch.zeros_like(mask)
        for k, shifted in enumerate(_shifts(mask, dilations)):
            refined.addcmul_(shifted, weight[:, k : k + 1])
        mask = refined
    return mask

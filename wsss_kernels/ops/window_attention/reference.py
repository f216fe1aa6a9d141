"""Window and exchange attention in plain PyTorch: the truth that every kernel is compared with.

Sources: M0 Eq. 3 (cross-attention exchange), M2 Eq. 2 (global attention), Swin Transformer (ICCV 2021) for windows, cyclic
shift and relative-position bias.

Where released code differs: Swin lets padding take part in the softmax; here it is masked.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def _pair(n: int | Pair) -> Pair:
    return (n, n) if isinstance(n, int) else (n[0], n[1])


def _axis(size: int, window: int, shift: int) -> tuple[Tensor, Tensor]:
    """Per shifted position its source in the padded extent, and whether it wrapped around."""
    padded = -(-size // window) * window
    at = torch.arange(padded) + shift
    return at % padded, at >= padded


def windows(size: Pair, window: Pair, shift: Pair, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel, region and validity of each slot of each window: `Tensor[windows, slots]`. Slots in the padding point to pixel 0."""
    (y, y_wrapped), (x, x_wrapped) = (_axis(*axis) for axis in zip(size, window, shift, strict=True))
    inside = (y < size[0])[:, None] & (x < size[1])
    pixel = torch.where(inside, y[:, None] * size[1] + x, 0)
    region = 2 * y_wrapped[:, None].long() + x_wrapped.long()

    def split(t: Tensor) -> Tensor:
        blocks = t.view(t.shape[0] // window[0], window[0], t.shape[1] // window[1], window[1])
        return blocks.permute(0, 2, 1, 3).reshape(-1, window[0] * window[1]).to(device)

    return split(pixel), split(region), split(inside)


def relative_position(window: Pair, device: torch.device) -> Tensor:
    """Row of the bias table for each query and key slot, `Tensor[slots, slots]`."""
    slot = torch.arange(window[0] * window[1], device=device)
    rows, columns = slot // window[1], slot % window[1]
    return (rows[:, None] - rows + window[0] - 1) * (2 * window[1] - 1) + columns[:, None] - columns + window[1] - 1


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    window_size: int | Pair | None = None,
    shift: int | Pair = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `wsss_kernels.window_attention`."""
    result, shape = query.dtype, query.shape
    if result in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
        bias = None if bias is None else bias.float()
    depth = shape[-1] // num_heads
    scale = depth**-0.5 if scale is None else scale
    q, k, v = (t.reshape(t.shape[0], t.shape[1] * t.shape[2], num_heads, depth) for t in (query, key, value))
    if window_size is None:
        logits = torch.einsum("bqhc,bkhc->bhqk", scale * q, k)
        return torch.einsum("bhqk,bkhc->bqhc", logits.softmax(-1), v).reshape(shape).to(result)
    window, moved = _pair(window_size), _pair(shift)
    pixel, region, inside = windows((shape[1], shape[2]), window, moved, query.device)
    logits = torch.einsum("bwqhc,bwkhc->bwhqk", scale * q[:, pixel], k[:, pixel])
    if bias is not None:
        logits = logits + bias[relative_position(window, query.device)].permute(2, 0, 1)
    apart = (region[:, :, None] != region[:, None]) | ~inside[:, None]
    apart = apart & inside[:, :, None]  # rows of the padding are dropped below, but must not be empty
    weight = logits.masked_fill(apart[:, None], -torch.inf).softmax(-1)
    attended = torch.einsum("bwhqk,bwkhc->bwqhc", weight, v[:, pixel])
    position = inside.flatten().nonzero().flatten()  # every pixel lies in exactly one slot
    order = position[pixel.flatten()[position].argsort()]
    return attended.flatten(1, 2)[:, order].reshape(shape).to(result)


def exchange_attention(
    primary: tuple[Tensor, Tensor, Tensor],
    structural: tuple[Tensor, Tensor, Tensor],
    *,
    num_heads: int,
    window_size: int | Pair | None = None,
    shift: int | Pair = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See `wsss_kernels.exchange_attention`."""
    options: dict[str, Any] = {"num_heads": num_heads, "window_size": window_size, "shift": shift, "bias": bias, "scale": scale}
    return (
        window_attention(structural[0], *primary[1:], **options),
        window_attention(primary[0], *structural[1:], **options),
    )


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, scale: float) -> Tensor:
    """Global attention by PyTorch's own kernel."""
    q, k, v = (
        t.reshape(t.shape[0], t.shape[1] * t.shape[2], num_heads, t.shape[3] // num_heads).transpose(1, 2) for t in (query, key, value)
    )
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(query.shape)

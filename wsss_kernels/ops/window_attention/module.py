"""The cross-attention exchange of M0 as a module: two pre-norm transformer blocks, one per direction."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ... import _args
from .api import exchange_attention, pair


class _Block(nn.Module):
    """What one direction owns: projections, spatial reduction, Mix-FFN. `norm1` is shared by query and key/value input."""

    def __init__(self, dim: int, kv_reduction: int, mlp_ratio: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.project = (nn.Linear(dim, dim) for _ in range(4))
        self.reduce = nn.Conv2d(dim, dim, kv_reduction, stride=kv_reduction) if kv_reduction > 1 else None
        self.reduce_norm = nn.LayerNorm(dim) if kv_reduction > 1 else None
        hidden = dim * mlp_ratio
        self.expand, self.contract = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.reduce is not None and self.reduce_norm is not None:
            x = self.reduce_norm(self.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.key(x), self.value(x)

    def mix(self, x: Tensor) -> Tensor:
        hidden = self.depthwise(self.expand(self.norm2(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.contract(F.gelu(hidden))


class CrossAttentionExchange(nn.Module):
    """Exchanges features of the primary and the structural branch (M0 Eq. 3): cross-attention both ways, each in a pre-norm
    transformer block with a Mix-FFN (3×3 depthwise convolution, GELU).

    Args:
        dim: number of channels C.
        num_heads: divides C.
        window_size: attend inside windows; `None` globally.
        kv_reduction: keys and values are reduced by a convolution of this kernel and stride, with LayerNorm (1: not; only
            globally).
        mlp_ratio: hidden channels of the Mix-FFN over C.
        residual: `"query"` adds the attention to the input of the query, so that the branches swap (the released code);
            `"target"` to the input of key and value.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        window_size: int | tuple[int, int] | None = None,
        kv_reduction: int = 1,
        mlp_ratio: int = 4,
        residual: str = "query",
    ):
        super().__init__()
        name = "CrossAttentionExchange"
        for what, value in (("dim", dim), ("num_heads", num_heads), ("kv_reduction", kv_reduction), ("mlp_ratio", mlp_ratio)):
            _args.integer(name, what, value, 1)
        _args.choice(name, "residual", residual, ("query", "target"))
        if dim % num_heads:
            raise ValueError(f"{name}: num_heads must divide dim, got {num_heads} and {dim}")
        if window_size is not None:
            pair(name, "window_size", window_size, 1)
        if kv_reduction > 1 and window_size is not None:
            raise ValueError(f"{name}: kv_reduction needs window_size=None, got {kv_reduction} and {window_size}")
        self.num_heads, self.window_size, self.residual = num_heads, window_size, residual
        self.primary, self.structural = _Block(dim, kv_reduction, mlp_ratio), _Block(dim, kv_reduction, mlp_ratio)

    def forward(self, primary: Tensor, structural: Tensor) -> tuple[Tensor, Tensor]:
        """`Tensor[B, H, W, C]` twice → the same shapes."""
        p, t = self.primary, self.structural
        to_primary = (t.query(t.norm1(primary)), *p.key_value(p.norm1(primary)))
        to_structural = (p.query(p.norm1(structural)), *t.key_value(t.norm1(structural)))
        z_p, z_t = exchange_attention(to_primary, to_structural, num_heads=self.num_heads, window_size=self.window_size)
        kept_p, kept_t = (structural, primary) if self.residual == "query" else (primary, structural)
        return p.mix(kept_p + p.project(z_p)), t.mix(kept_t + t.project(z_t))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, residual={self.residual!r}"

"""What the Triton kernels share: launch, precision, tile products, unit rows. Imported by `triton_impl.py` files alone.

A launcher computes grid and block sizes from metadata, allocates with PyTorch, and calls `launch`. Nothing here or there reads
a value of a tensor on the host, so that a launcher can be captured in a CUDA graph.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _native
from ._args import accumulator

__all__ = ["LOG2E", "accumulator", "config", "dot", "launch", "multiply_adds", "power_of_2", "precision", "unit_rows", "unit_rows_backward"]

LOG2E = tl.constexpr(1 / math.log(2))
_INTERPRETED = tl.constexpr(_native.INTERPRETED)

paths: set[str] = set()
"""The launch paths that this process has taken; see `testing.launch_paths`."""
compiled: list[tuple[str, str, Any]] = []
"""(path, kernel, compiled kernel) of every launch, where kernels are compiled ahead and not run; see `aot.py`."""
overrides: dict[str, dict] = {}
"""Launch configurations that the tuner tries, by key; they precede the tuned ones."""
asked: dict[str, Sequence[Mapping[str, int]]] = {}
"""The alternatives of every configuration that was asked for, by key: what a tuner may try."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b.

    The interpreter would multiply the raw bits of bfloat16, and hand float32 tiles to a BLAS whose rounding depends on where in the
    tile an element lies, as no GPU's does (s_ij and s_ji of one set must be equal): there the product is formed in float64.
    """
    if _INTERPRETED:
        acc += tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(acc.dtype)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


def precision(dtype: torch.dtype) -> str:
    """How products of float32 tiles are formed: from three TF32 products on the tensor cores, which keep float32's digits.

    On an H200 they were quicker and more exact than float32 multiply-adds, whose one long sum per element failed the tolerance
    rule. With `torch.backends.cuda.matmul.allow_tf32` they are single TF32 products, good for three digits, as PyTorch's own are
    then. Other types have one way only.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def multiply_adds(dtype: torch.dtype) -> str:
    """As `precision`, for kernels that are quicker by float32 multiply-adds: large tiles with nothing to do but the product."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def power_of_2(n: int, least: int = 16, most: int = 1 << 20) -> int:
    """The smallest power of two that holds `n`, between `least` (16: the smallest factor of a tile product) and `most`."""
    return max(least, min(most, triton.next_power_of_2(max(n, 1))))


def launch(path: str, kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Runs a kernel on the device of its first tensor.

    Args:
        path: `"<operator>.triton.<variant>"`, reported to the tests, which demand that samples take every path of the spec.
        kernel: a `@triton.jit` function.
        grid: up to three extents; the second and third stay below 65536. Nothing runs if one of them is 0.
        *args: tensors and numbers. Offsets beyond 2^31 are the kernel's concern: it casts program ids to int64.
        **meta: block sizes, `num_warps`, `num_stages`.
    """
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if _native.AHEAD:
        compiled.append((path, kernel.fn.__name__, kernel.warmup(*args, grid=grid, **meta)))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)
    paths.add(path)


def config_file(folder: Path | None = None) -> Path:
    """The file of tuned configurations for this machine's GPU, in WSSS_KERNELS_CONFIGS, else in the user's cache folder."""
    named = os.environ.get("WSSS_KERNELS_CONFIGS")
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wsss_kernels"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no gpu"
    return (folder or (Path(named) if named else cache_folder)) / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@cache
def _tuned() -> dict[str, dict]:
    """The configurations that `python -m wsss_kernels.bench --tune` wrote for this GPU: the user's, else the shipped ones."""
    for file in (config_file(), config_file(Path(__file__).parent / "configs")):
        if file.is_file():
            return json.loads(file.read_text())
    return {}


def forget_tuned() -> None:
    """The next launch reads the file of tuned configurations again."""
    _tuned.cache_clear()


def config(key: str, default: Mapping[str, int], alternatives: Sequence[Mapping[str, int]] = ()) -> dict[str, int]:
    """Block sizes, warps and stages of a launch: the fixed choice, unless a tuned one exists for this GPU.

    Args:
        key: the kernel and what its best choice depends on, sizes as powers of two: `"supcon_fwd/d16"`.
        default: the heuristic's choice, explained where it is made.
        alternatives: what `--tune` tries beside it. Never tried at a user's call.
    """
    asked[key] = (default, *alternatives)
    if key in overrides:
        return dict(overrides[key])
    return dict(default if _native.AHEAD else _tuned().get(key, default))


@triton.jit
def _unit_kernel(x_ptr, unit_ptr, norm_ptr, rows, depth, BM: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, BK)
    kind = unit_ptr.dtype.element_ty
    largest = tl.zeros((BM,), kind)
    for start in range(0, depth, BK):
        inside = (row < rows)[:, None] & (start + column < depth)[None, :]
        x = tl.load(x_ptr + row[:, None] * depth + start + column[None, :], mask=inside, other=0.0).to(kind)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    # Squares of tiny or huge rows leave the range: these are divided by their largest entry first.
    tame = (largest == 0) | ((largest > 1e-15) & (largest < 1e15))
    safe = tl.where(tame, 1.0, largest)
    square = tl.zeros((BM,), kind)
    for start in range(0, depth, BK):
        inside = (row < rows)[:, None] & (start + column < depth)[None, :]
        x = tl.load(x_ptr + row[:, None] * depth + start + column[None, :], mask=inside, other=0.0).to(kind) / safe[:, None]
        square += tl.sum(x * x, axis=1)
    length = tl.where(largest > 0, tl.sqrt(square), 1.0)
    for start in range(0, depth, BK):
        inside = (row < rows)[:, None] & (start + column < depth)[None, :]
        x = tl.load(x_ptr + row[:, None] * depth + start + column[None, :], mask=inside, other=0.0).to(kind) / safe[:, None]
        tl.store(unit_ptr + row[:, None] * depth + start + column[None, :], x / length[:, None], mask=inside)
    tl.store(norm_ptr + row, tl.where(largest > 0, safe * length, 0.0), mask=row < rows)


@triton.jit
def _unit_backward_kernel(unit_ptr, norm_ptr, grad_ptr, out_ptr, rows, depth, BM: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, BK)
    along = tl.zeros((BM,), unit_ptr.dtype.element_ty)
    for start in range(0, depth, BK):
        inside = (row < rows)[:, None] & (start + column < depth)[None, :]
        at = row[:, None] * depth + start + column[None, :]
        along += tl.sum(tl.load(unit_ptr + at, mask=inside, other=0.0) * tl.load(grad_ptr + at, mask=inside, other=0.0), axis=1)
    norm = tl.load(norm_ptr + row, mask=row < rows, other=0.0)
    inverse = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    for start in range(0, depth, BK):
        inside = (row < rows)[:, None] & (start + column < depth)[None, :]
        at = row[:, None] * depth + start + column[None, :]
        unit = tl.load(unit_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        tl.store(out_ptr + at, ((grad - unit * along[:, None]) * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def _row_blocks(depth: int) -> dict[str, int]:
    """About 4096 elements a program: one or two loads of 16 bytes per thread in flight."""
    width = power_of_2(depth, most=1024)
    return {"BM": max(1, min(64, 4096 // width)), "BK": width, "num_warps": 4}


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `Tensor[N, d]` divided by their norms, zero rows zero, and the norms; float32, float64 for float64."""
    x = x.contiguous()
    unit, norm = x.new_empty(x.shape, dtype=accumulator(x.dtype)), x.new_empty(x.shape[0], dtype=accumulator(x.dtype))
    blocks = _row_blocks(x.shape[1])
    launch("unit_rows", _unit_kernel, (triton.cdiv(x.shape[0], blocks["BM"]),), x, unit, norm, *x.shape, **blocks)
    return unit, norm


def unit_rows_backward(unit: Tensor, norm: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient with respect to the rows that `unit_rows` was given; 0 for a zero row."""
    out = grad.new_empty(grad.shape, dtype=dtype)
    blocks = _row_blocks(grad.shape[1])
    arguments = (unit, norm, grad, out, *grad.shape)
    launch("unit_rows.backward", _unit_backward_kernel, (triton.cdiv(grad.shape[0], blocks["BM"]),), *arguments, **blocks)
    return out

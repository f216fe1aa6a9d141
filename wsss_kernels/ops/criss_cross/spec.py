from __future__ import annotations

import torch
from torch import Tensor

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randn
from . import api, reference


def _inputs(batch: int, keys: int, values: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(batch, keys, height, width),
        randn(batch, keys, height, width, seed=1),
        randn(batch, values, height, width, seed=2),
    )


def samples() -> list[Sample]:
    def sample(note: str, *size: int, scale: float = 1.0, **options) -> Sample:
        query, *rest = _inputs(*size)
        batch, _, channels, height, width = size
        lines = batch * (height + width if height > 1 else 1)
        return Sample(note, (scale * query, *rest), small=lines <= 10 and batch * channels * height * width <= 900, **options)

    return [
        sample("typical", 2, 2, 5, 2, 3),
        sample("CCNet's eighth", 1, 4, 32, 9, 13),
        sample("prime sizes", 1, 3, 11, 17, 19),
        sample("one row", 2, 3, 4, 1, 23),
        sample("one column", 2, 3, 4, 23, 1),
        sample("a short column", 1, 2, 3, 4, 1),
        sample("1×1", 2, 2, 3, 1, 1),
        sample("two columns", 1, 2, 3, 9, 2),
        sample("wider than the registers of a panel", 1, 2, 3, 4, 67),
        sample("deeper than a block of channels", 1, 37, 41, 5, 6),
        sample("more channels than a tile", 1, 37, 70, 2, 3),
        sample("a line of several blocks", 1, 2, 3, 1, 133),
        sample("rows beyond a packed panel", 1, 2, 3, 3, 269),
        sample("large logits", 1, 4, 3, 2, 3, scale=32.0),
        sample("no key channel", 1, 0, 3, 2, 3),
        sample("empty batch", 0, 2, 3, 4, 5),
    ]


def malformed() -> list[Malformed]:
    query, key, value = (t.float() for t in _inputs(2, 3, 4, 5, 6))
    return [
        Malformed("rank", (query[0], key, value), {}, ValueError, "query must be .* B×C×H×W, got float32 of shape 3×5×6"),
        Malformed("integer", (query, key.long(), value), {}, TypeError, "key must be a floating-point tensor .* got int64"),
        Malformed("not a tensor", (query, key, None), {}, TypeError, "value must be a floating-point tensor .* got None"),
        Malformed("empty map", (query[..., :0], key, value), {}, ValueError, "query must be .* a spatial extent must not be 0"),
        Malformed("key channels", (query, key[:, :2], value), {}, ValueError, r"query and key must have the same shape.*3, 5, 6.*2, 5, 6"),
        Malformed("batch", (query, key, value[:1]), {}, ValueError, "query and value must have the same batch size, got 2 and 1"),
        Malformed("size", (query, key, value[..., :5]), {}, ValueError, "query and value must have the same height and width"),
        Malformed("mixed dtypes", (query, key, value.double()), {}, TypeError, "query and value must have one dtype"),
    ]


def weights_sum_to_one(run) -> None:
    query, key, value = _inputs(2, 3, 4, 6, 7)
    torch.testing.assert_close(run(query, key, torch.ones_like(value)), torch.ones_like(value), rtol=1e-13, atol=0)


def full_attention_restricted_to_the_cross(run) -> None:
    query, key, value = _inputs(2, 3, 4, 6, 7)
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij"))
    cross = (y[:, None] == y) | (x[:, None] == x)
    logits = (query.flatten(2).mT @ key.flatten(2)).masked_fill(~cross, -torch.inf)
    wanted = value.flatten(2) @ logits.softmax(-1).mT
    torch.testing.assert_close(run(query, key, value), wanted.view_as(value), rtol=1e-12, atol=1e-13)


def off_the_cross_nothing_matters(run) -> None:
    query, key, value = _inputs(1, 3, 4, 6, 7)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, 2, 3], other_value[:, :, 2, 3] = 5.0, 9.0
    a, b = run(query, key, value), run(query, other_key, other_value)
    changed = (a != b).any(dim=1)[0].nonzero().tolist()
    assert changed and all(y == 2 or x == 3 for y, x in changed)


def transposed_map(run) -> None:
    query, key, value = _inputs(1, 3, 4, 6, 7)
    torch.testing.assert_close(run(query.mT, key.mT, value.mT), run(query, key, value).mT, rtol=1e-12, atol=1e-13)


def _case(channels: int, size: int, *, batch: int = 1, backward: bool = False, target: float | None = None, **options) -> Case:
    def make():
        g = generator(0)
        pair = [torch.randn(batch, channels // 8, size, size, generator=g) / (channels // 8) ** 0.5 for _ in range(2)]
        return (*pair, torch.randn(batch, channels, size, size, generator=g)), {}

    return Case(f"{batch}x{channels}x{size}x{size}{'_grad' if backward else ''}", make, backward=backward, target=target, **options)


def _flops(query, key, value) -> float:
    batch, keys, height, width = query.shape
    return 2.0 * batch * height * width * (height + width - 1) * (keys + value.shape[1])


def _peak(query, key, value) -> int:
    """Two statistics per pixel of the columns and of the whole; per thread the weights of a row or of 16 neighbouring columns."""
    batch, _, height, width = query.shape
    if query.is_cuda:  # channels-last copies of the maps and of the result, two pairs of statistics
        return 4 * (query.numel() + key.numel() + 2 * value.numel() + 4 * batch * height * width)
    stride = -(-width // 32) * 32
    return 4 * (4 * batch * height * stride + torch.get_num_threads() * max((height + 67) * height * 16, (width + 3) * stride))


SPECS = (
    OpSpec(
        operator=api.CRISS_CROSS_OP,
        public=api.criss_cross_attention,
        reference=reference.criss_cross_attention,
        paper="M2 Eq. 1; CCNet, ICCV 2019",
        samples=samples,
        gradients=("query", "key", "value"),
        invariants=(weights_sum_to_one, full_attention_restricted_to_the_cross, off_the_cross_nothing_matters, transposed_map),
        malformed=malformed,
        paths={
            "cpu": ("criss_cross.fwd", "criss_cross.bwd"),
            "triton": tuple(f"criss_cross.triton{end}" for end in ("", ".long", ".statistics", ".inner", ".backward", ".backward.long")),
        },
        cases=(
            _case(256, 64, target=2.0),
            _case(256, 64, backward=True),
            _case(512, 28, batch=4, backward=True),
            _case(512, 97, backward=True, quick=False),
            _case(512, 97, batch=8, backward=True, quick=False, gpu=True),
        ),
        sweeps=(Sweep("H·W", {n * n: _case(256, n) for n in (24, 32, 48, 64, 96)}, 1.5),),
        baselines=("eager",),
        flops=_flops,
        bytes_moved=lambda query, key, value: 4.0 * (2 * query.numel() + 2 * value.numel()),
        peak_bytes=_peak,
    ),
)

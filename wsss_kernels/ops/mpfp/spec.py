from __future__ import annotations

import torch
import torch.nn.functional as F

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randn
from . import api, reference

SCALES = (2, 4, 8, 16)


def _inputs(batch: int, channels: int, height: int, width: int, fusions: int) -> tuple[torch.Tensor, ...]:
    pos, neg = (0.25 * randn(fusions, 2, 2 * channels, 3, 3, seed=seed) for seed in (1, 2))
    return randn(batch, channels, height, width) + 0.25, pos, neg


def samples() -> list[Sample]:
    def sample(note: str, *size: int, scales: tuple[int, ...] = SCALES, **options) -> Sample:
        small = size[0] * size[1] * size[2] * size[3] <= 900
        return Sample(note, _inputs(*size, len(scales) - 1), {"scales": scales}, small=small, **options)

    sparse = _inputs(1, 2, 8, 8, 1)
    quarter = sparse[0].clone()
    quarter[:, :, :4, :4] = 0  # whole bins, so that pooled values are exactly 0
    return [
        sample("typical", 2, 2, 9, 11),
        sample("the published size", 2, 2, 28, 28),
        sample("prime sizes", 1, 3, 17, 19, scales=(2, 5, 7)),
        sample("wider than two registers", 1, 1, 5, 71),
        sample("tall", 1, 2, 67, 3),
        sample("scales beyond the map", 1, 2, 3, 5, scales=(2, 4, 8, 16, 31)),
        sample("a scale far beyond the map", 1, 2, 3, 5, scales=(2, 181)),
        sample("one scale", 2, 3, 6, 7, scales=(3,)),
        sample("scales in any order", 1, 2, 7, 6, scales=(4, 1, 6)),
        sample("one channel", 2, 1, 6, 7),
        sample("many channels", 1, 20, 5, 6, scales=(2, 4)),
        sample("1×1", 2, 2, 1, 1),
        sample("empty batch", 0, 2, 5, 6),
        Sample("zeros (a kink)", (quarter, *sparse[1:]), {"scales": (1, 2)}, gradcheck=False),
    ]


def malformed() -> list[Malformed]:
    feature, pos, neg = (t.float() for t in _inputs(1, 2, 4, 5, 3))
    return [
        Malformed("rank", (feature[0], pos, neg), {}, ValueError, "feature must be .* B×C×h×w, got float32 of shape 2×4×5"),
        Malformed("integer", (feature.long(), pos, neg), {}, TypeError, "feature must be a floating-point tensor .* got int64"),
        Malformed("no channel", (feature[:, :0], pos, neg), {}, ValueError, "feature must have at least one channel"),
        Malformed("empty map", (feature[..., :0], pos, neg), {}, ValueError, "feature must be .* a spatial extent must not be 0"),
        Malformed("few weights", (feature, pos[:2], neg), {}, ValueError, "weight_pos must be of shape 3×2×4×3×3, got .* 2×2×4×3×3"),
        Malformed("weight rank", (feature, pos, neg[0]), {}, ValueError, "weight_neg must be .* got float32 of shape 2×4×3×3"),
        Malformed("weight not a tensor", (feature, None, neg), {}, TypeError, "weight_pos must be a floating-point tensor .* got None"),
        Malformed("mixed dtypes", (feature, pos, neg.double()), {}, TypeError, "feature and weight_neg must have one dtype"),
        Malformed("no scale", (feature, pos, neg), {"scales": ()}, ValueError, "scales must hold at least one scale"),
        Malformed("scale 0", (feature, pos, neg), {"scales": (2, 4, 0, 8)}, ValueError, "every scale must be at least 1, got 0"),
        Malformed("float scale", (feature, pos, neg), {"scales": (2, 4.0, 8, 16)}, TypeError, "every scale must be an int, got 4.0"),
        Malformed("scales not a sequence", (feature, pos, neg), {"scales": 4}, TypeError, "scales must be a sequence of ints, got 4"),
    ]


def zero_weights_average_the_levels(run) -> None:
    """All gates are ½, so a fusion is a quarter of the sum of its two levels."""
    feature, pos, neg = _inputs(2, 3, 9, 11, 3)
    levels = [F.interpolate(F.adaptive_avg_pool2d(feature, s), size=(9, 11), mode="bilinear") for s in SCALES]
    fused = levels[0]
    for level in levels[1:]:
        fused = (fused + level) / 4
    logit, given = run(feature, 0 * pos, 0 * neg)
    torch.testing.assert_close(given, fused, rtol=1e-12, atol=1e-13)
    wanted = (fused.relu() * feature.relu() - (-fused).relu() * (-feature).relu()).mean((2, 3))
    torch.testing.assert_close(logit, wanted, rtol=1e-12, atol=1e-13)


def mirrored(run) -> None:
    """The negative of the map with both convolutions exchanged gives the negative."""
    feature, pos, neg = _inputs(2, 2, 9, 7, 3)
    logit, fused = run(feature, pos, neg)
    other_logit, other_fused = run(-feature, neg, pos)
    torch.testing.assert_close(other_fused, -fused, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other_logit, -logit, rtol=1e-12, atol=1e-14)


def _case(batch: int, target: float | None = None) -> Case:
    def make():
        g = generator(0)
        weights = [0.2 * torch.randn(3, 2, 4, 3, 3, generator=g) for _ in range(2)]
        return (torch.randn(batch, 2, 28, 28, generator=g), *weights), {}

    return Case(f"{batch}x2x28x28", make, backward=True, target=target)


def _cells(feature, scales) -> int:
    """Cells of a sample's maps, rows rounded up to 32, and of the signs with their borders."""
    channels, (height, width) = feature.shape[1], feature.shape[-2:]
    stride, levels = -(-width // 32) * 32, len(scales)
    return (
        (2 * levels * channels + 4 * (levels - 1)) * height * stride
        + 4 * channels * (height + 2) * (stride + 16)
        + max(scales) * (stride + max(scales))
    )


def _peak(feature, weight_pos, weight_neg, *, scales=SCALES, **_) -> int:
    workers = min(torch.get_num_threads(), feature.shape[0])
    return feature.element_size() * (workers * _cells(feature, scales) + 2 * weight_pos.numel())


def _flops(feature, weight_pos, weight_neg, *, scales=SCALES, **_) -> float:
    return feature.numel() * (72.0 * 2 * (len(scales) - 1) + 8 * len(scales))


SPECS = (
    OpSpec(
        operator=api.MPFP_OP,
        public=api.mpfp,
        reference=reference.mpfp,
        paper="M2 Eq. 5–9",
        samples=samples,
        gradients=("feature", "weight_pos", "weight_neg"),
        autocast="fp32",
        invariants=(zero_weights_average_the_levels, mirrored),
        malformed=malformed,
        paths={
            "cpu": ("mpfp.fwd", "mpfp.bwd"),
            "cuda": ("mpfp.cuda.shared.fwd", "mpfp.cuda.shared.bwd", "mpfp.cuda.general.fwd", "mpfp.cuda.general.bwd"),
        },
        cases=(_case(16, 5.0), _case(1), _case(64)),
        sweeps=(Sweep("batch", {n: _case(n) for n in (1, 4, 16, 64)}, 1),),
        baselines=("eager",),
        flops=_flops,
        bytes_moved=lambda feature, *rest, **_: 2.0 * feature.numel() * feature.element_size(),
        peak_bytes=_peak,
    ),
)

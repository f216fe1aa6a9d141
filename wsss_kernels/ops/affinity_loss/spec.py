from __future__ import annotations

import torch

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randint, randn
from . import api, reference


def _call(batch: int, depth: int, height: int, width: int, classes: int = 3, void: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    feature = (randn(batch, depth, height, width) / depth**0.5).bfloat16().double()
    label = randint(classes, batch, height, width, seed=1)
    if void:
        label = torch.where(randint(6, batch, height, width, seed=2) == 0, 255, label)
    return feature, label


def samples() -> list[Sample]:
    feature, label = _call(2, 5, 3, 7)
    return [
        Sample("typical", (feature, label)),
        Sample("cross-entropy", (feature, label), {"kind": "bce"}),
        Sample("radius", (feature, label), {"radius": 2}),
        Sample("radius 0", (feature, label), {"radius": 0, "kind": "bce"}),
        Sample("other void label", (feature, label), {"ignore_index": 1}),
        Sample("all void", (feature, torch.full_like(label, 255)), {"kind": "bce"}),
        Sample("all void, balanced", (feature, torch.full_like(label, 255))),
        Sample("one class", (feature, torch.zeros_like(label))),
        Sample("large products", (16 * feature, label), {"kind": "bce"}),
        Sample("zero features", (0 * feature, label), {"kind": "bce"}),
        Sample("1×1", _call(2, 3, 1, 1, void=False)),
        Sample("one channel", _call(1, 1, 3, 5)),
        Sample("empty batch", _call(0, 3, 4, 5)),
        Sample("label type", (feature, label.to(torch.uint8))),
        Sample("wide labels", (feature, label * 10**12 - 5)),
        Sample("several blocks", _call(1, 21, 17, 19), small=False),
        Sample("several blocks, radius", _call(2, 21, 17, 19), {"radius": 3, "kind": "bce"}, small=False),
        Sample("many channels", _call(1, 300, 23, 29), {"kind": "bce"}, small=False),
        Sample("wide blocks", _call(1, 4, 46, 47), {"radius": 9}, small=False),
    ]


def malformed() -> list[Malformed]:
    feature, label = torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
    return [
        Malformed(
            "rank",
            (feature[0], label),
            {},
            ValueError,
            "feature must be a floating-point tensor of shape B×d×h×w, got float32 of shape 3×4×5",
        ),
        Malformed("label rank", (feature, label[0]), {}, ValueError, "label must be .* of shape B×h×w, got int64 of shape 4×5"),
        Malformed("integer feature", (feature.long(), label), {}, TypeError, "feature must be a floating-point tensor .* got int64"),
        Malformed(
            "floating label", (feature, label.float()), {}, TypeError, "label must be an int64, int32 or uint8 tensor .* got float32"
        ),
        Malformed(
            "sizes",
            (feature, label[:, :3]),
            {},
            ValueError,
            r"feature and label must have the same batch, height and width, got \(2, 4, 5\)",
        ),
        Malformed("empty map", (feature[..., :0], label[..., :0]), {}, ValueError, "a spatial extent must not be 0"),
        Malformed("no channel", (feature[:, :0], label), {}, ValueError, "feature must have at least one channel"),
        Malformed("kind", (feature, label), {"kind": "mse"}, ValueError, "kind must be one of 'balanced', 'bce', got 'mse'"),
        Malformed("negative radius", (feature, label), {"radius": -1}, ValueError, "radius must be at least 0, got -1"),
        Malformed("float radius", (feature, label), {"radius": 1.5}, TypeError, "radius must be an int, got 1.5"),
        Malformed("ignore_index", (feature, label), {"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ]


def order_of_cells_does_not_matter(run) -> None:
    feature, label = _call(2, 5, 6, 7)
    for kind in ("balanced", "bce"):
        flipped = run(feature.flip(2, 3), label.flip(1, 2), kind=kind, radius=3)
        torch.testing.assert_close(flipped, run(feature, label, kind=kind, radius=3), rtol=1e-12, atol=0)


def wide_radius_is_no_limit(run) -> None:
    feature, label = _call(2, 5, 6, 7)
    torch.testing.assert_close(run(feature, label, radius=7), run(feature, label), rtol=1e-12, atol=0)


def void_cells_do_not_matter(run) -> None:
    feature, label = _call(1, 5, 6, 7)
    other = torch.where(label == 255, 100.0, feature)
    torch.testing.assert_close(run(other, label), run(feature, label), rtol=1e-12, atol=0)


def zero_features_are_undecided(run) -> None:
    feature, label = _call(1, 5, 6, 7, void=False)
    torch.testing.assert_close(run(0 * feature, label, kind="bce"), torch.tensor(2.0, dtype=torch.float64).log(), rtol=1e-12, atol=0)


def _case(
    batch: int, depth: int, height: int, width: int, *, quick: bool = True, gpu: bool = False, target: float | None = None, **options
) -> Case:
    def make():
        g = generator(0)
        feature = torch.randn(batch, depth, height, width, generator=g) / depth**0.5
        label = torch.randint(4, (batch, height, width), generator=g)
        return (feature, torch.where(torch.rand(batch, height, width, generator=g) < 0.1, 255, label)), options

    return Case(f"{batch}x{depth}x{height}x{width}", make, backward=True, quick=quick, gpu=gpu, target=target)


def _peak(feature, label, **_) -> float:
    """Rows of one image, its labels and coordinates, packed columns, a tile of each thread.

    On a GPU a strip of products, the sums and counts of tiles of them, and a copy of features of half precision or another layout.
    """
    size, cells = feature.element_size(), feature.shape[2] * feature.shape[3]
    rows = (cells + 128) * (feature.shape[1] + 64) * size
    usual = rows + 64 * cells + 8 * label.numel() + (256 * feature.shape[1] + 64 * 272 * torch.get_num_threads()) * size
    if not feature.is_cuda:
        return usual
    batch, wide = feature.shape[0], max(4, size)
    strip = min(batch * cells * cells * wide, max(32 << 20, 128 * cells * wide))
    tiles = batch * (cells / 32 + 1) * (cells / 64 + 1)
    return usual + strip + 16 * tiles + batch * (cells + 16) + (0 if size == wide and feature.is_contiguous() else feature.numel() * wide)


SPECS = (
    OpSpec(
        operator=api.AFFINITY_LOSS_OP,
        public=api.affinity_loss,
        reference=reference.affinity_loss,
        paper="M4 Eq. 3.20–3.21; AFA, CVPR 2022",
        samples=samples,
        gradients=("feature",),
        float32_outputs=(0,),
        autocast="fp32",
        invariants=(order_of_cells_does_not_matter, wide_radius_is_no_limit, void_cells_do_not_matter, zero_features_are_undecided),
        malformed=malformed,
        paths={"cpu": ("affinity_loss.cpu",), "triton": ("affinity_loss.triton", "affinity_loss.triton.count")},
        cases=(
            _case(1, 256, 20, 20),
            _case(4, 256, 32, 32, quick=False),
            _case(1, 256, 48, 48, quick=False, target=3.0),
            _case(1, 256, 64, 64, quick=False, gpu=True),
        ),
        sweeps=(Sweep("N", {n * n: _case(1, 256, n, n) for n in (10, 20, 28, 40)}, 2),),
        baselines=("eager",),
        flops=lambda feature, label, **_: 1.0 * feature.numel() * feature.shape[2] * feature.shape[3],
        bytes_moved=lambda feature, label, **_: 4.0 * feature.numel(),
        peak_bytes=_peak,
        streaming=True,
    ),
)

from __future__ import annotations

import torch
from torch import Tensor

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randn
from . import fuse, reference


def _maps(batch: int, classes: int, *sizes: tuple[int, int]) -> list[Tensor]:
    return [randn(batch, classes, *size, seed=i) for i, size in enumerate(sizes)]


def samples() -> list[Sample]:
    def sample(note: str, cams: list[Tensor], size: tuple[int, int], present: Tensor | None = None, **options) -> Sample:
        weights = [0.5, 0.25, 0.375][: len(cams)]
        if present is not None:
            options["present"] = present
        return Sample(note, (cams, weights, size), options, small=len(cams[0]) * size[0] * size[1] <= 400)

    two = [(3, 4), (5, 2)]
    gate = torch.tensor([[1, 0, 1], [0, 1, 1]])
    printed = {"mode": "sum_then_normalize"}
    return [
        sample("typical", _maps(2, 3, *two), (7, 9), gate.double()),
        sample("three maps", _maps(2, 2, (4, 4), (3, 5), (7, 6)), (11, 13)),
        sample("Eq. 10 as printed", _maps(2, 3, *two), (7, 9), gate, **printed),
        sample("Eq. 10 as printed, floating present", _maps(2, 3, *two), (7, 9), 0.5 * gate.double(), **printed),
        sample("boolean present", _maps(2, 3, *two), (6, 5), gate.bool()),
        sample("one map of the right size", _maps(1, 2, (5, 6)), (5, 6)),
        sample("to smaller maps", _maps(1, 2, (9, 11), (7, 8)), (4, 3)),
        sample("to one pixel", _maps(1, 2, (3, 4), (5, 2)), (1, 1)),
        sample("from one row and one column", _maps(1, 2, (1, 5), (5, 1)), (4, 6)),
        sample("wide", _maps(1, 2, (5, 7)), (41, 131)),
        sample("no class", _maps(2, 0, *two), (3, 4)),
        sample("empty batch", _maps(0, 2, *two), (3, 4)),
    ]


def malformed() -> list[Malformed]:
    cams = [c.float() for c in _maps(2, 3, (3, 4), (5, 2))]
    one, size = [1.0, 1.0], (6, 7)
    return [
        Malformed("one tensor", (cams[0], one, size), {}, TypeError, "cams must be a non-empty list of tensors, got float32"),
        Malformed("no map", ([], [], size), {}, TypeError, "cams must be a non-empty list of tensors"),
        Malformed("rank", ([cams[0][0]], [1.0], size), {}, ValueError, r"cams\[0\] must be .* B×K×h×w, got float32 of shape 3×3×4"),
        Malformed(
            "integer", ([cams[0], cams[1].long()], one, size), {}, TypeError, r"cams\[1\] must be a floating-point tensor .* got int64"
        ),
        Malformed(
            "empty map", ([cams[0], cams[1][..., :0]], one, size), {}, ValueError, r"cams\[1\] must be .* a spatial extent must not be 0"
        ),
        Malformed("classes", ([cams[0], cams[1][:, :2]], one, size), {}, ValueError, r"cams\[0\] and cams\[1\] must have the same batch"),
        Malformed("mixed dtypes", ([cams[0], cams[1].double()], one, size), {}, TypeError, r"cams\[0\] and cams\[1\] must have one dtype"),
        Malformed("few weights", (cams, [1.0], size), {}, ValueError, "weights must be a list of one number per map, got .* for 2 maps"),
        Malformed("negative weight", (cams, [1.0, -0.5], size), {}, ValueError, "weights must not be negative"),
        Malformed("NaN weight", (cams, [1.0, float("nan")], size), {}, ValueError, r"weights\[1\] must be a finite number, got nan"),
        Malformed("size", (cams, one, 5), {}, TypeError, "size must be a pair of ints, got 5"),
        Malformed("size 0", (cams, one, (4, 0)), {}, ValueError, "height and width of size must be at least 1, got 0"),
        Malformed("mode", (cams, one, size), {"mode": "max"}, ValueError, "mode must be one of 'normalize_then_sum'"),
        Malformed(
            "present", (cams, one, size), {"present": torch.ones(2, 2)}, ValueError, r"cams\[0\] and present must have the same batch"
        ),
        Malformed("present dtype", (cams, one, size), {"present": torch.ones(2, 3).double()}, TypeError, "present must have one dtype"),
    ]


def weights_bound_the_sum(run) -> None:
    cams = _maps(2, 3, (3, 4), (5, 2))
    result = run(cams, [0.5, 0.25], (9, 11))
    assert bool((result >= 0).all()) and float(result.max()) <= 0.75 * (1 + 1e-14)
    printed = run(cams, [0.5, 0.25], (9, 11), mode="sum_then_normalize")
    assert bool((printed.amin((2, 3)) == 0).all()) and bool((printed.amax((2, 3)) == 1).all())


def absent_classes_are_zero(run) -> None:
    cams, present = _maps(2, 3, (3, 4), (5, 2)), torch.tensor([[1, 0, 1], [0, 1, 1]])
    for mode in ("normalize_then_sum", "sum_then_normalize"):
        plain = run(cams, [0.5, 0.25], (9, 11), mode=mode).cpu()
        gated = run(cams, [0.5, 0.25], (9, 11), mode=mode, present=present).cpu()
        torch.testing.assert_close(gated, plain * present[:, :, None, None], rtol=0, atol=0)


def _case(batch: int, classes: int, size: int) -> Case:
    def make():
        g = generator(0)
        cams = [torch.randn(batch, classes, s, s, generator=g) for s in (16, 32, 16)]
        return (cams, [0.4, 0.3, 0.3], (size, size)), {"present": torch.ones(batch, classes)}

    return Case(f"{batch}x{classes}_to_{size}x{size}", make)


def _peak(cams, weights, size, **_) -> int:
    """Normalised maps, times `present`; the columns of a plane per thread."""
    small = sum(cam.numel() for cam in cams)
    return 4 * (2 * small + torch.get_num_threads() * size[1] * sum(cam.shape[2] for cam in cams))


FUSE_SPEC = OpSpec(
    operator=fuse.FUSE_OP,
    public=fuse.fuse_cams,
    reference=reference.fuse_cams,
    paper="M0 Eq. 10",
    samples=samples,
    gradients=("cams", "present"),
    invariants=(weights_bound_the_sum, absent_classes_are_zero),
    malformed=malformed,
    paths={"cpu": ("fuse_cams.fwd", "fuse_cams.bwd"), "cuda": ("fuse_cams.cuda.fwd", "fuse_cams.cuda.bwd")},
    cases=(_case(4, 3, 512), _case(1, 20, 320)),
    sweeps=(Sweep("H·W", {n * n: _case(1, 20, n) for n in (80, 160, 320, 512)}, 1),),
    baselines=("eager_fuse",),
    bytes_moved=lambda cams, weights, size, **_: 4.0 * cams[0].shape[0] * cams[0].shape[1] * size[0] * size[1],
    peak_bytes=_peak,
)

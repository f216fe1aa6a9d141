from __future__ import annotations

import torch
from torch import Tensor

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randn
from . import api, reference
from .fuse_spec import FUSE_SPEC


def positive(*size: int, seed: int = 0) -> Tensor:
    """Maps without a zero, so that the minimum has a gradient too."""
    return randn(*size, seed=seed).abs() + 0.25


def samples() -> list[Sample]:
    def sample(note: str, cam: Tensor, *, gradcheck: bool = True, **options) -> Sample:
        return Sample(note, (cam,), options, small=cam.numel() <= 900, gradcheck=gradcheck)

    tiles = positive(1, 59, 71, seed=11)  # more than one block takes
    tiles[0, 3, 4], tiles[0, 58, 70] = 0.125, 9.0  # extrema that no two pixels share
    two_of_each = torch.tensor([[0.5, 2.0, 1.0], [2.0, 0.5, 0.75]], dtype=torch.float64)
    return [
        sample("typical", randn(2, 3, 11, 13)),
        sample("positive", positive(2, 3, 11, 13, seed=1)),
        sample("28×28 tokens", randn(3, 28, 28, seed=2)),
        sample("no leading dimension", randn(7, 9, seed=3)),
        sample("three leading dimensions", positive(2, 1, 3, 5, 7, seed=4)),
        sample("one row", positive(2, 1, 37, seed=5)),
        sample("one column", positive(2, 67, 1, seed=6)),
        sample("1×1 (always constant)", positive(3, 1, 1), gradcheck=False),
        sample("two pixels", torch.tensor([[0.5, 2.0], [-1.0, 3.0]], dtype=torch.float64).view(2, 1, 2)),
        sample("empty batch", randn(0, 5, 6)),
        sample("nothing positive", -positive(2, 5, 6)),
        sample("constant (a kink)", torch.full((2, 5, 6), 0.75, dtype=torch.float64), gradcheck=False),
        sample("shared extrema (a kink)", two_of_each, gradcheck=False),
        sample("below eps", positive(2, 5, 7, seed=8), eps=100.0),
        sample("other eps", positive(2, 5, 7, seed=9), eps=0.125),
        Sample("several tiles", (tiles,)),
        sample("large", randn(2, 97, 211, seed=10)),
    ]


def malformed() -> list[Malformed]:
    cam = torch.rand(2, 4, 5)
    return [
        Malformed("rank", (cam[0, 0],), {}, ValueError, "cam must be a floating-point tensor of shape …×h×w, got float32 of shape 5"),
        Malformed("integer", (cam.long(),), {}, TypeError, "cam must be a floating-point tensor .* got int64 of shape 2×4×5"),
        Malformed("not a tensor", (None,), {}, TypeError, "cam must be a floating-point tensor .* got None"),
        Malformed("no column", (cam[..., :0],), {}, ValueError, "cam must be .* a spatial extent must not be 0"),
        Malformed("zero eps", (cam,), {"eps": 0.0}, ValueError, "eps must be a positive finite number, got 0.0"),
        Malformed("NaN eps", (cam,), {"eps": float("nan")}, ValueError, "eps must be a positive finite number, got nan"),
        Malformed("eps not a number", (cam,), {"eps": None}, TypeError, "eps must be a number, got None"),
    ]


def spans_zero_to_one(run) -> None:
    result = run(randn(3, 9, 11))
    assert bool((result.amin((-2, -1)) == 0).all()) and bool((result.amax((-2, -1)) == 1).all())


def scale_does_not_matter(run) -> None:
    cam = positive(2, 9, 11)
    torch.testing.assert_close(run(8 * cam), run(cam), rtol=0, atol=0)
    torch.testing.assert_close(run(cam + 4), run(cam), rtol=0, atol=1e-14)


def _case(name: str, *size: int, backward: bool = False) -> Case:
    return Case(name, lambda: ((torch.randn(*size, generator=generator(0)),), {}), backward=backward)


SPECS = (
    OpSpec(
        operator=api.NORMALIZE_OP,
        public=api.normalize_cam,
        reference=reference.normalize_cam,
        paper="M0 Eq. 10; M4 §3.5.6",
        samples=samples,
        gradients=("cam",),
        invariants=(spans_zero_to_one, scale_does_not_matter),
        malformed=malformed,
        paths={
            "cpu": ("normalize_cam.fwd", "normalize_cam.bwd"),
            "cuda": tuple(f"normalize_cam.cuda.{path}.{way}" for path in ("block", "tiles") for way in ("fwd", "bwd")),
        },
        cases=(
            _case("4x20_maps_28x28", 4, 20, 28, 28),
            _case("4x20_maps_28x28_grad", 4, 20, 28, 28, backward=True),
            _case("20_maps_512x512", 20, 512, 512),
        ),
        sweeps=(Sweep("H·W", {n * n: _case(f"20_maps_{n}x{n}", 20, n, n) for n in (64, 128, 256, 512)}, 1),),
        baselines=("eager",),
        bytes_moved=lambda cam, **_: 8.0 * cam.numel(),
        peak_bytes=lambda cam, **_: 0,
    ),
    FUSE_SPEC,
)

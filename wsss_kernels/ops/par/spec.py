from __future__ import annotations

import torch

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, rand, randn
from . import api, reference

RELEASED = (1, 2, 4, 8, 12, 24)


def _image(*size: int, seed: int = 0) -> torch.Tensor:
    """A smooth ramp with noise and an edge: weights that are neither uniform nor one-hot."""
    rows, columns = torch.linspace(0, 2, size[-2], dtype=torch.float64), torch.linspace(0, 1, size[-1], dtype=torch.float64)
    smooth = rows[:, None] + columns + (columns > 0.5)
    return (smooth + 0.3 * randn(*size, seed=seed)).bfloat16().double()


def _sample(
    note: str, size: tuple[int, int, int, int], classes: int, dilations=(1, 2), num_iter: int = 3, *, mask_size=None, **options
) -> Sample:
    batch, _, height, width = size
    mask = rand(batch, classes, *(mask_size or (height, width)), seed=1)
    return Sample(note, (_image(*size), mask, dilations, num_iter), options, small=height * width * classes <= 600)


def samples() -> list[Sample]:
    def half_bound(truth, image, mask, *rest):
        return 5e-4 * float(mask.abs().max())

    return [
        _sample("typical", (2, 3, 11, 13), 2),
        _sample("released dilations", (1, 3, 17, 19), 2, RELEASED, 2),
        _sample("wide", (1, 3, 9, 70), 3, RELEASED, 2),
        _sample("rows of whole vectors", (1, 3, 5, 100), 1, RELEASED, 2),
        _sample("many classes", (1, 3, 7, 23), 21, (1, 3), 2),
        _sample("pamr", (2, 3, 11, 13), 2, variant="pamr"),
        _sample("pamr, one dilation", (1, 3, 7, 9), 1, (1,), 2, variant="pamr"),
        _sample("one channel, one class", (1, 1, 5, 7), 1, (3,)),
        _sample("dilation beyond the map", (1, 2, 3, 5), 2, (1, 40)),
        _sample("1×1", (2, 3, 1, 1), 2),
        _sample("one row", (1, 3, 1, 37), 2),
        _sample("one column", (1, 3, 37, 1), 2),
        _sample("no iteration", (1, 3, 4, 5), 2, num_iter=0),
        _sample("empty batch", (0, 3, 4, 5), 2),
        _sample("no class", (1, 3, 4, 5), 0),
        _sample("mask resized", (1, 3, 11, 13), 2, mask_size=(5, 4)),
        _sample("image resized", (1, 3, 11, 13), 2, mask_size=(5, 4), resize="image"),
        _sample("no resize", (1, 3, 6, 7), 2, resize=None),
        _sample("other scales", (1, 3, 6, 7), 2, w1=0.5, w2=0.2, w3=0.1),
        Sample("constant image", (torch.full((1, 3, 6, 7), 0.5, dtype=torch.float64), rand(1, 2, 6, 7, seed=1), (1, 2), 3)),
        Sample(
            "half weights",
            (_image(1, 3, 19, 31), rand(1, 3, 19, 31, seed=1), RELEASED, 20),
            {"exact": False},
            small=False,
            bound=half_bound,
        ),
        Sample("half weights, narrow", (_image(1, 3, 9, 7), rand(1, 5, 9, 7, seed=1), (1, 2), 5), {"exact": False}, bound=half_bound),
    ]


def malformed() -> list[Malformed]:
    image, mask = torch.rand(1, 3, 4, 5), torch.rand(1, 2, 4, 5)
    return [
        Malformed(
            "rank", (image[0], mask), {}, ValueError, "image must be a floating-point tensor of shape B×Q×H×W, got float32 of shape 3×4×5"
        ),
        Malformed("mask rank", (image, mask[0]), {}, ValueError, "mask must be .* B×C×h×w, got float32 of shape 2×4×5"),
        Malformed("batch", (image, mask.expand(2, 2, 4, 5)), {}, ValueError, "image and mask must have the same batch size, got 1 and 2"),
        Malformed("integer image", (image.long(), mask), {}, TypeError, "image must be a floating-point tensor .* got int64"),
        Malformed("boolean mask", (image, mask > 0.5), {}, TypeError, "mask must be a floating-point tensor .* got bool"),
        Malformed("not a tensor", (image, [1.0]), {}, TypeError, "mask must be a floating-point tensor .* got list"),
        Malformed(
            "mixed dtypes", (image, mask.double()), {}, TypeError, "image and mask must have one dtype, got torch.float32 and torch.float64"
        ),
        Malformed("no channel", (image[:, :0], mask), {}, ValueError, "image must have at least one channel"),
        Malformed("empty map", (image[..., :0], mask), {}, ValueError, "image must be .* a spatial extent must not be 0"),
        Malformed(
            "sizes differ",
            (image, mask[..., :3]),
            {"resize": None},
            ValueError,
            r"image and mask must have the same height and width.*\(4, 5\) and \(4, 3\)",
        ),
        Malformed("no dilation", (image, mask, ()), {}, ValueError, "dilations must hold at least one dilation, got an empty sequence"),
        Malformed("dilation 0", (image, mask, (1, 0)), {}, ValueError, "every dilation must be at least 1, got 0"),
        Malformed("float dilation", (image, mask, (1.5,)), {}, TypeError, "every dilation must be an int, got 1.5"),
        Malformed("dilations not a sequence", (image, mask, 3), {}, TypeError, "dilations must be a sequence of ints, got 3"),
        Malformed("negative iterations", (image, mask, (1,), -1), {}, ValueError, "num_iter must be at least 0, got -1"),
        Malformed("endless iterations", (image, mask, (1,), 10**30), {}, ValueError, "num_iter must be less than 2\\^31, got 10"),
        Malformed("variant", (image, mask), {"variant": "pam"}, ValueError, "variant must be one of 'par', 'pamr', got 'pam'"),
        Malformed("resize", (image, mask), {"resize": "both"}, ValueError, "resize must be one of 'mask', 'image', None, got 'both'"),
        Malformed("NaN scale", (image, mask), {"w1": float("nan")}, ValueError, "w1 must be a positive finite number, got nan"),
        Malformed("exact", (image, mask), {"exact": "no"}, TypeError, "exact must be True or False, got 'no'"),
        Malformed("zero scale", (image, mask), {"w2": 0.0}, ValueError, "w2 must be a positive finite number, got 0.0"),
    ]


def constant_mask_grows(run) -> None:
    """The weights of "par" sum to 1 + w3, those of "pamr" to 1."""
    image, mask = _image(1, 3, 8, 9), torch.ones(1, 1, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(run(image, mask, (1, 2), 5), mask * 1.01**5, rtol=1e-12, atol=0)
    torch.testing.assert_close(run(image, mask, (1, 2), 5, variant="pamr"), mask, rtol=1e-12, atol=0)


def linear_in_the_mask(run) -> None:
    image, a, b = _image(1, 3, 8, 9), randn(1, 2, 8, 9, seed=1), randn(1, 2, 8, 9, seed=2)
    torch.testing.assert_close(
        run(image, 2 * a - b, (1, 2), 4), 2 * run(image, a, (1, 2), 4) - run(image, b, (1, 2), 4), rtol=1e-10, atol=1e-11
    )


def image_scale_does_not_matter(run) -> None:
    image, mask = _image(1, 3, 8, 9), rand(1, 2, 8, 9, seed=1)
    torch.testing.assert_close(run(255 * image, mask, (1, 2), 4), run(image, mask, (1, 2), 4), rtol=1e-6, atol=1e-7)


def _case(size: int, classes: int, num_iter: int, target: float | None = None, **options) -> Case:
    def make():
        g = torch.Generator().manual_seed(0)
        ramp = torch.linspace(0, 255, size)
        image = (ramp + ramp[:, None]) / 2 + 30 * torch.rand(1, 3, size, size, generator=g)
        return (image, torch.rand(1, classes, size, size, generator=g), RELEASED, num_iter), options

    suffix = "" if options.get("exact", True) else "_half_weights"
    return Case(f"{size}_c{classes}_i{num_iter}{suffix}", make, quick=size <= 320 and classes <= 6, target=target)


def _planes(image, mask, dilations=RELEASED, num_iter=10, *, exact=True, **_) -> int:
    """Bytes: 110 (or 60) float16 planes per image; see the README for the parts."""
    pixels = max(image.shape[-2] * image.shape[-1], mask.shape[-2] * mask.shape[-1])
    return (110 if exact else 60) * 2 * pixels


def _flops(image, mask, dilations=RELEASED, num_iter=10, **_) -> float:
    pixels, neighbours = image.shape[0] * image.shape[-2] * image.shape[-1], 8 * len(dilations)
    return pixels * neighbours * (2.0 * mask.shape[1] * num_iter + 5 * image.shape[1])


def _bytes(image, mask, dilations=RELEASED, num_iter=10, *, exact=True, **_) -> float:
    pixels, neighbours = image.shape[0] * image.shape[-2] * image.shape[-1], 8 * len(dilations)
    return pixels * num_iter * (neighbours * (4 if exact else 2) + 8.0 * mask.shape[1])


SPECS = (
    OpSpec(
        operator=api.PAR_OP,
        public=api.par,
        reference=reference.par,
        paper="M4 Eq. 3.17; AFA, CVPR 2022; PAMR, CVPR 2020",
        samples=samples,
        gradients=("mask",),
        refused=("image",),
        autocast="fp32",
        invariants=(constant_mask_grows, linear_in_the_mask, image_scale_does_not_matter),
        malformed=malformed,
        paths={
            "cpu": ("par.cpu.exact", "par.cpu.half_weights", "par.cpu.float64"),
            "cuda": (
                "par.cuda.general",
                "par.cuda.general.adjoint",
                "par.cuda.tiles",
                "par.cuda.tiles.adjoint",
                "par.cuda.tiles.half_weights",
                "par.cuda.tiles.vectors",
            ),
        },
        cases=(
            _case(320, 2, 10, 45.0),
            _case(320, 2, 10, 70.0, exact=False),
            _case(320, 6, 20, 65.0),
            _case(320, 6, 20, 100.0, exact=False),
            _case(320, 21, 20),
            _case(512, 2, 20),
            _case(512, 21, 20),
        ),
        sweeps=(
            Sweep("H·W", {n * n: _case(n, 2, 10) for n in (96, 160, 320, 512)}, 1),
            Sweep("classes", {c: _case(160, c, 10) for c in (2, 6, 12, 24)}, 1),
            Sweep("iterations", {i: _case(160, 2, i) for i in (5, 10, 20, 40)}, 1),
        ),
        baselines=("eager", "pad_and_slice"),
        flops=_flops,
        bytes_moved=_bytes,
        peak_bytes=_planes,
    ),
)

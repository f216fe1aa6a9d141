from __future__ import annotations

import torch
from torch import Tensor

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, rand
from . import api, reference


def blobs(*size: int, seed: int = 0, noise: float = 0.0) -> Tensor:
    """Maps of a few Gaussian bumps with their maximum at 1, in float64. Grey levels are exact in every dtype: 255 times a
    bfloat16 number is a float32 number."""
    *lead, height, width = size
    g = generator(seed)
    rows, columns = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    cam = noise * torch.rand(*size, generator=g, dtype=torch.float64)
    for _ in range(3):
        y, x, s, top = torch.rand(4, *lead, 1, 1, generator=g, dtype=torch.float64)
        spread = (0.06 + 0.14 * s) * min(height, width) + 0.3
        cam = cam + (0.4 + 0.6 * top) * torch.exp(-((rows - y * height) ** 2 + (columns - x * width) ** 2) / (2 * spread**2))
    highest = cam.amax((-2, -1), keepdim=True) if cam.numel() else 1.0
    return (cam / highest).bfloat16().double()


def spiral(height: int, width: int) -> Tensor:
    """One pixel wide with one pixel of background between its turns: a single component that every row crosses often."""
    map_ = torch.zeros(height, width, dtype=torch.float64)
    y, x, dy, dx = 0, 0, 0, 1
    map_[0, 0] = 1
    turns = 0
    while turns < 2:
        ahead = [(y + k * dy, x + k * dx) for k in (1, 2)]
        inside = [0 <= a < height and 0 <= b < width for a, b in ahead]
        if inside[0] and not any(map_[at] for at, within in zip(ahead, inside, strict=True) if within):
            (y, x), turns = ahead[0], 0
            map_[y, x] = 1
        else:
            dy, dx, turns = dx, -dy, turns + 1
    return map_


def checkerboard(height: int, width: int) -> Tensor:
    """One component if corners connect, else one per pixel."""
    return ((torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0).double()


def isolated(height: int, width: int) -> Tensor:
    """As many 8-connected components as a map can hold."""
    return ((torch.arange(height)[:, None] % 2 == 0) & (torch.arange(width) % 2 == 0)).double()


def combs(height: int, width: int) -> Tensor:
    """Two interlocked combs: components that stay apart until the last row joins the teeth of one of them."""
    map_ = (torch.arange(width) % 2 == 0).double().repeat(height, 1)
    map_[:, 2::4] = map_[:, 2::4] * (torch.arange(height) < height - 2).double()[:, None]
    map_[-1] = 1
    return map_


def special() -> Tensor:
    inf, nan = float("inf"), float("nan")
    row = [nan, 1.0, -inf, 0.5, 0.25, -1.0, 0.0]
    return torch.tensor([[row, row[::-1], [2.0, inf, nan, 0.0, 1.5, 0.75, 0.5]], [[nan] * 7, [-inf] * 7, [-1.0] * 7]], dtype=torch.float64)


def box_mask_samples() -> list[Sample]:
    def sample(note: str, cam: Tensor, threshold: float = 0.4, **options) -> Sample:
        return Sample(note, (cam, threshold), options, small=cam.numel() <= 900)

    return [
        sample("typical", blobs(2, 3, 11, 13)),
        sample("14×14 tokens", blobs(3, 14, 14, noise=0.5)),
        sample("28×28 tokens", blobs(2, 4, 28, 28, noise=0.7), 0.7),
        sample("noise", rand(5, 13, 11), 0.6),
        sample("clipped border", rand(3, 7, 9), 0.8, clip_border=True),
        sample("no leading dimension", blobs(7, 9)),
        sample("three leading dimensions", rand(2, 1, 3, 5, 7), 0.7),
        sample("1×1", torch.tensor([1.0, 0.0, 0.001], dtype=torch.float64).bfloat16().double().view(3, 1, 1)),
        sample("one row", rand(2, 1, 37), 0.7),
        sample("one long row", rand(2, 1, 150), 0.7),
        sample("a row of many words", rand(1, 531), 0.8, clip_border=True),
        sample("one column", rand(2, 67, 1), 0.7),
        sample("64 columns", rand(2, 6, 64), 0.8),
        sample("65 columns", rand(2, 6, 65), 0.8),
        sample("wide", blobs(2, 5, 83, noise=0.4)),
        sample("wide noise", rand(1, 7, 128), 0.8),
        sample("wide, clipped border", rand(1, 6, 131), 0.8, clip_border=True),
        sample("large", blobs(2, 97, 211, noise=0.6), 0.6),
        sample("empty batch", rand(0, 5, 6)),
        sample("zeros", torch.zeros(2, 4, 70, dtype=torch.float64)),
        sample("ones", torch.ones(2, 5, 6, dtype=torch.float64), 0.999),
        sample("ones, wide, clipped border", torch.ones(1, 5, 66, dtype=torch.float64), clip_border=True),
        sample("threshold 0", rand(2, 5, 6), 0.0),
        sample("threshold 1", rand(2, 5, 6), 1.0),
        sample("negative threshold", rand(2, 5, 6), -0.5, clip_border=True),
        sample("NaN, infinity, out of range", special()),
        sample("spiral", spiral(21, 23)),
        sample("wide spiral", spiral(9, 75)),
        sample("checkerboard", checkerboard(9, 11)),
        sample("isolated pixels", isolated(9, 65)),
        sample("diagonal", torch.eye(17, dtype=torch.float64)),
        sample("combs", combs(9, 31)),
        sample("wide combs", combs(7, 91)),
    ]


def components_samples() -> list[Sample]:
    def sample(note: str, mask: Tensor, connectivity: int = 8) -> Sample:
        return Sample(note, (mask,), {"connectivity": connectivity}, small=mask.numel() <= 900)

    maps = {"spiral": spiral(13, 17), "checkerboard": checkerboard(8, 9), "isolated pixels": isolated(7, 9), "combs": combs(7, 13)}
    return [
        sample("typical", rand(2, 3, 11, 13).sub(0.5).relu()),
        sample("4-connected", rand(2, 3, 11, 13).sub(0.5).relu(), 4),
        *[sample(f"{name}, {c}-connected", mask, c) for name, mask in maps.items() for c in (4, 8)],
        sample("bool", rand(2, 9, 70) > 0.5),
        sample("bool, 4-connected", rand(2, 9, 70) > 0.5, 4),
        sample("int64", (rand(7, 9) > 0.6).long() * 300),
        sample("uint8", (rand(1, 5, 129) > 0.6).to(torch.uint8) * 200),
        sample("NaN and infinity are not 0", special()),
        sample("1×1", torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1)),
        sample("one row", rand(1, 200).sub(0.5).relu()),
        sample("a row of many words", rand(1, 531).sub(0.3).relu(), 4),
        sample("one column", rand(67, 1).sub(0.5).relu(), 4),
        sample("empty batch", rand(0, 5, 6)),
        sample("zeros", torch.zeros(2, 5, 6, dtype=torch.float64)),
        sample("ones", torch.ones(1, 5, 66, dtype=torch.float64), 4),
        sample("large", rand(2, 97, 211).sub(0.4).relu()),
    ]


def box_mask_malformed() -> list[Malformed]:
    cam = torch.rand(2, 4, 5)
    return [
        Malformed("rank", (cam[0, 0],), {}, ValueError, "cam must be a floating-point tensor of shape …×h×w, got float32 of shape 5"),
        Malformed("integer", (cam.long(),), {}, TypeError, "cam must be a floating-point tensor .* got int64 of shape 2×4×5"),
        Malformed("not a tensor", ([[1.0]],), {}, TypeError, "cam must be a floating-point tensor .* got list"),
        Malformed("no row", (cam[:, :0],), {}, ValueError, "cam must be .* got float32 of shape 2×0×5: a spatial extent must not be 0"),
        Malformed("no column", (cam[..., :0],), {}, ValueError, "a spatial extent must not be 0"),
        Malformed("NaN threshold", (cam, float("nan")), {}, ValueError, "threshold must be a finite number, got nan"),
        Malformed("infinite threshold", (cam, float("inf")), {}, ValueError, "threshold must be a finite number, got inf"),
        Malformed("clip_border", (cam,), {"clip_border": "no"}, TypeError, "clip_border must be True or False, got 'no'"),
        Malformed("sparse", (cam.to_sparse(),), {}, TypeError, "cam must be a dense tensor, got layout torch.sparse_coo; use cam.to_dense"),
        Malformed("an array", (cam.numpy(),), {}, TypeError, "cam must be a floating-point tensor .* got ndarray of shape 2×4×5$"),
        Malformed("float8", (cam.to(torch.float8_e4m3fn),), {}, TypeError, "cam must be a floating-point tensor .* got float8_e4m3fn"),
        Malformed("threshold not a number", (cam, "0.4"), {}, TypeError, "threshold must be a number, got '0.4'"),
    ]


def components_malformed() -> list[Malformed]:
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    return [
        Malformed("rank", (mask[0, 0],), {}, ValueError, "mask must be a tensor of shape …×h×w, got bool of shape 5"),
        Malformed("not a tensor", ([[1.0]],), {}, TypeError, "mask must be a tensor .* got list"),
        Malformed("no row", (mask[:, :0],), {}, ValueError, "mask must be .* a spatial extent must not be 0"),
        Malformed("connectivity", (mask,), {"connectivity": 6}, ValueError, "connectivity must be one of 4, 8, got 6"),
    ]


def follows_symmetries(run) -> None:
    """Flipping or transposing the map flips or transposes the mask."""
    cam = torch.cat([blobs(2, 19, 23, noise=0.5), rand(2, 19, 23)])
    mask = run(cam, 0.7)
    assert torch.equal(run(cam.flip(-1), 0.7), mask.flip(-1)) and torch.equal(run(cam.flip(-2), 0.7), mask.flip(-2))
    assert torch.equal(run(cam.transpose(-1, -2), 0.7), mask.transpose(-1, -2))


def covers_the_foreground(run) -> None:
    cam = blobs(3, 15, 70, noise=0.6)
    level = (255 * cam).trunc()
    foreground = level > (0.5 * level.amax((-2, -1), keepdim=True)).trunc()
    assert bool((run(cam, 0.5) >= foreground.double()).all())


def four_refines_eight(run) -> None:
    """Pixels that are 4-connected are 8-connected; the first components agree with the first foreground pixel."""
    mask = rand(3, 17, 70) > 0.6
    four, eight = run(mask, connectivity=4).long(), run(mask, connectivity=8).long()
    assert torch.equal(four > 0, mask) and torch.equal(eight > 0, mask)
    for a, b in zip(four, eight, strict=True):
        pairs = torch.stack([a[a > 0], b[a > 0]]).unique(dim=1)
        assert pairs.shape[1] == int(a.max()) and int(b.max()) <= int(a.max())


def _maps(cam: Tensor) -> tuple[int, int, int]:
    height, width = cam.shape[-2:]
    return min(cam.numel() // (height * width), torch.get_num_threads()), height, width


def _box_mask_peak(cam: Tensor, threshold: float = 0.4, **_) -> float:
    """Per thread: the bit string; the cover of a narrow map; the runs and boxes of a wide one. On a GPU: labels and boxes of
    the large maps that share a workspace. See the README."""
    threads, height, width = _maps(cam)
    pixels = height * width
    if cam.is_cuda:
        return 8.25 * min(cam.numel(), max(pixels, 1 << 22)) if pixels > 128**2 else 0.0
    return threads * (pixels / 8 + 8 * height if width <= 64 else 9.125 * pixels + 12 * height + 4 * width)


def _components_peak(mask: Tensor, **_) -> float:
    threads, height, width = _maps(mask)
    copy = 0 if mask.dtype in (torch.bool, torch.uint8) else mask.numel()
    if mask.is_cuda:
        return copy + mask.numel() / 256
    return copy + threads * (6.125 * height * width + 4 * height)


def _case(name: str, size: tuple[int, ...], noise: float, target: float | None = None, quick: bool = True) -> Case:
    return Case(name, lambda: ((blobs(*size, noise=noise).float(),), {}), quick=quick, target=target)


def _mask_case(name: str, size: tuple[int, ...], noise: float, quick: bool = True) -> Case:
    return Case(name, lambda: ((blobs(*size, noise=noise) > 0.4,), {}), quick=quick)


SPECS = (
    OpSpec(
        operator=api.BOX_MASK_OP,
        public=api.box_mask,
        reference=reference.box_mask,
        paper="M4 §3.5.6; CLIP-ES, CVPR 2023",
        samples=box_mask_samples,
        refused=("cam",),
        outputs="exact",
        invariants=(follows_symmetries, covers_the_foreground),
        malformed=box_mask_malformed,
        paths={
            "cpu": ("box_mask.narrow", "box_mask.wide"),
            "cuda": ("box_mask.cuda.warp", "box_mask.cuda.block", "box_mask.cuda.large"),
        },
        cases=(
            _case("64_maps_28x28", (64, 28, 28), 0.0, 20.0),
            _case("64_maps_28x28_noisy", (64, 28, 28), 0.6, 20.0),
            _case("6_maps_14x14", (6, 14, 14), 0.0),
            _case("8_maps_512x512", (8, 512, 512), 0.0),
            _case("1_map_1024x2048_noisy", (1, 1024, 2048), 0.6, quick=False),
        ),
        sweeps=(Sweep("H·W", {n * n: _case(f"8_maps_{n}x{n}", (8, n, n), 0.3) for n in (64, 128, 256, 512)}, 1),),
        baselines=("opencv_loop",),
        bytes_moved=lambda cam, *_, **__: 8.0 * cam.numel(),
        peak_bytes=_box_mask_peak,
    ),
    OpSpec(
        operator=api.COMPONENTS_OP,
        public=api.connected_components,
        reference=reference.connected_components,
        paper="M4 §3.5.6",
        samples=components_samples,
        refused=("mask",),
        outputs="exact",
        invariants=(four_refines_eight,),
        malformed=components_malformed,
        paths={
            "cpu": ("connected_components",),
            "cuda": ("connected_components.cuda.block", "connected_components.cuda.large"),
        },
        cases=(
            _mask_case("64_maps_28x28", (64, 28, 28), 0.6),
            _mask_case("8_maps_512x512", (8, 512, 512), 0.0),
            _mask_case("1_map_1024x2048_noisy", (1, 1024, 2048), 0.6, quick=False),
        ),
        sweeps=(Sweep("H·W", {n * n: _mask_case(f"8_maps_{n}x{n}", (8, n, n), 0.3) for n in (64, 128, 256, 512)}, 1),),
        baselines=("scipy_components",),
        bytes_moved=lambda mask, **_: 5.0 * mask.numel(),
        peak_bytes=_components_peak,
    ),
)

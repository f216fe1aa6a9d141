from __future__ import annotations

import torch

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, rand
from ..affinity import reference as affinity_reference
from ..affinity.spec import TILE, refining_bytes, refining_flops, refining_inputs, refining_malformed, scaled, spread_features, spread_maps
from ..sinkhorn.spec import CHUNKS, positive, slice_bytes, with_empty
from . import api, reference


def mask(*size: int) -> torch.Tensor:
    return (rand(*size, seed=9) > 0.3).double()


def _walk(
    note: str, batch: int, classes: int, h: int, w: int, *, masked: bool = True, change=lambda m: m, gradcheck=True, **options
) -> Sample:
    size = (batch, classes, h, w)
    args = (change(positive(batch, h * w, h * w)), rand(*size, seed=1), *([mask(*size)] if masked else []))
    return Sample(note, args, options, small=h * w <= 60, gradcheck=gradcheck)


def walk_samples() -> list[Sample]:
    return [
        _walk("typical", 2, 3, 3, 5),
        _walk("no mask", 2, 3, 3, 5, masked=False),
        _walk("target", 2, 3, 3, 5, mask_side="target"),
        _walk("three steps", 1, 2, 3, 4, power=3),
        _walk("one step", 1, 2, 3, 4, power=1),
        _walk("no step", 2, 2, 3, 4, power=0),
        _walk("no round", 2, 2, 3, 4, sinkhorn_iter=0),
        _walk("one round", 2, 2, 3, 4, sinkhorn_iter=1),
        _walk("six rounds", 1, 2, 3, 4, sinkhorn_iter=6),
        _walk("no class", 2, 0, 3, 4),
        _walk("many classes", 1, 21, 3, 5),
        _walk("one row", 1, 6, 1, 17),
        _walk("empty batch", 0, 2, 3, 4),
        Sample("one token", (torch.full((2, 1, 1), 0.5, dtype=torch.float64), rand(2, 3, 1, 1) + 0.5)),
        Sample("no batch", (positive(12, 12), rand(3, 3, 4, seed=1), mask(3, 3, 4))),
        _walk("empty row and column (kink)", 1, 3, 3, 5, change=with_empty, gradcheck=False),
        _walk("nothing but zeros (kink)", 1, 2, 2, 3, change=torch.zeros_like, gradcheck=False),
        Sample("more tokens than a block takes", (positive(1, 131, 131), rand(1, 5, 1, 131, seed=1)), {"sinkhorn_iter": 2, "power": 2}),
        _walk("several chunks of rows, prime", 1, 5, 1, 211),
        _walk("two images of several chunks", 2, 7, 13, 17),
    ]


def affinity_walk_samples() -> list[Sample]:
    cam, masked = rand(2, 3, 2, 5, seed=1), mask(2, 3, 2, 5)
    decoder, features, maps = scaled(2, 5, 10), spread_features(4, 6, 10), spread_maps(4, 10)
    as_maps = {"encoder_is": "affinity"}
    large = (rand(1, 3, 1, 151, seed=1), scaled(1, 9, 151))
    return [
        Sample("streaming", (cam, decoder, features, masked), {"streaming": True}),
        Sample("stored", (cam, decoder, features, masked), {"streaming": False}),
        Sample("chosen by N", (cam, decoder, features)),
        Sample("streaming maps", (cam, decoder, maps, masked), {**as_maps, "streaming": True}),
        Sample("stored maps, target", (cam, decoder, maps, masked), {**as_maps, "streaming": False, "mask_side": "target"}),
        Sample("streaming, no decoder", (cam, None, features, masked), {"streaming": True, "first_layer": 2}),
        Sample("streaming maps, no decoder", (cam, None, maps), {**as_maps, "streaming": True, "first_layer": 1}),
        Sample("streaming, signed", (cam, decoder, features), {"streaming": True, "signed": True, "sinkhorn_iter": 1, "power": 3}),
        Sample("streaming, no step", (cam, decoder, features, masked), {"streaming": True, "power": 0}),
        Sample("streaming, no round", (cam, decoder, features), {"streaming": True, "sinkhorn_iter": 0}),
        Sample("streaming, no class", (cam[:, :0], decoder, features), {"streaming": True}),
        Sample("streaming, empty batch", (cam[:0], decoder[:0], features[:0]), {"streaming": True}),
        Sample("streaming, several strips, prime", (*large, spread_features(3, 21, 151, 1)), {"streaming": True}, small=False),
        Sample("streaming, several strips of maps", (*large, spread_maps(3, 151, 1)), {**as_maps, "streaming": True}, small=False),
    ]


def walk_malformed() -> list[Malformed]:
    a, c = torch.rand(2, 6, 6), torch.rand(2, 4, 2, 3)
    return [
        Malformed("rank", (a[None], c), {}, ValueError, "affinity must be .* B×N×N, got float32 of shape 1×2×6×6"),
        Malformed("cam rank", (a, c[0]), {}, ValueError, "cam must be .* B×K×h×w, got float32 of shape 4×2×3"),
        Malformed("batch only in cam", (a[0], c), {}, ValueError, "cam must be .* K×h×w, got float32 of shape 2×4×2×3"),
        Malformed("not square", (a[:, :5], c), {}, ValueError, "the rows and the columns of affinity .* got 5 and 6"),
        Malformed("tokens", (a, c[..., :2]), {}, ValueError, "affinity and cam must have the same number of tokens .* got 6 and 4"),
        Malformed("batch", (a[:1], c), {}, ValueError, "affinity and cam must have the same batch size, got 1 and 2"),
        Malformed(
            "mask shape", (a, c, c[:, :1]), {}, ValueError, r"cam and mask must have the same shape, got \(2, 4, 2, 3\) and \(2, 1, 2, 3\)"
        ),
        Malformed("boolean mask", (a, c, c > 0.5), {}, TypeError, "mask must be a floating-point tensor .* got bool"),
        Malformed("mixed dtypes", (a, c.double()), {}, TypeError, "affinity and cam must have one dtype"),
        Malformed("integers", (a.long(), c), {}, TypeError, "affinity must be a floating-point tensor .* got int64"),
        Malformed("not a tensor", (None, c), {}, TypeError, "affinity must be a floating-point tensor .* got None"),
        Malformed("empty map", (a, c[..., :0]), {}, ValueError, "cam must be .* a spatial extent must not be 0"),
        Malformed("negative power", (a, c), {"power": -1}, ValueError, "power must be at least 0, got -1"),
        Malformed("negative rounds", (a, c), {"sinkhorn_iter": -1}, ValueError, "sinkhorn_iter must be at least 0, got -1"),
        Malformed("mask_side", (a, c), {"mask_side": "both"}, ValueError, "mask_side must be one of 'source', 'target', got 'both'"),
    ]


def affinity_walk_malformed() -> list[Malformed]:
    c, d, f = torch.rand(2, 4, 2, 3), torch.rand(2, 3, 6), torch.rand(2, 3, 4, 6)
    return [
        *refining_malformed((c,)),
        Malformed("cam rank", (c[0], d, f), {}, ValueError, "cam must be .* B×K×h×w, got float32 of shape 4×2×3"),
        Malformed("cam batch", (c[:1], d, f), {}, ValueError, "cam and encoder must have the same batch size, got 1 and 2"),
        Malformed("cam tokens", (c[..., :2], d, f), {}, ValueError, "cam and encoder must have the same number of tokens .* got 4 and 6"),
        Malformed("streaming", (c, d, f), {"streaming": 1}, TypeError, "streaming must be True, False or None, got 1"),
        Malformed("power", (c, d, f), {"power": 0.5}, TypeError, "power must be an int, got 0.5"),
    ]


def mass_is_kept(run) -> None:
    """T is symmetric and doubly stochastic once Sinkhorn has converged."""
    a, cam = positive(2, 15, 15), rand(2, 3, 3, 5, seed=1)
    result = run(a, cam, sinkhorn_iter=200, power=4)
    torch.testing.assert_close(result.sum((-1, -2)), cam.sum((-1, -2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(run(a, torch.ones_like(cam), sinkhorn_iter=200), torch.ones_like(cam), rtol=1e-12, atol=0)


def linear_in_the_cam(run) -> None:
    a, x, y = positive(1, 15, 15), rand(1, 2, 3, 5, seed=1), rand(1, 2, 3, 5, seed=2)
    torch.testing.assert_close(run(a, 2 * x - y), 2 * run(a, x) - run(a, y), rtol=1e-12, atol=1e-14)


def steps_compose(run) -> None:
    a, x = positive(1, 15, 15), rand(1, 2, 3, 5, seed=1)
    torch.testing.assert_close(run(a, run(a, x, power=1), power=2), run(a, x, power=3), rtol=1e-13, atol=0)


def order_of_tokens_does_not_matter(run) -> None:
    a, x, order = positive(1, 15, 15), rand(1, 2, 1, 15, seed=1), torch.randperm(15, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run(a[:, order][:, :, order], x[..., order]), run(a, x)[..., order], rtol=1e-13, atol=0)


def an_identity_leaves_the_cam(run) -> None:
    cam, cut = rand(1, 2, 3, 5, seed=1), mask(1, 2, 3, 5)
    eye = 3 * torch.eye(15, dtype=torch.float64)[None]
    for side in ("source", "target"):
        torch.testing.assert_close(run(eye, cam, cut, mask_side=side), cam * cut, rtol=1e-14, atol=0)


def same_bits_stored_and_streaming(run) -> None:
    cam, decoder = rand(1, 3, 1, 151, seed=1), scaled(1, 9, 151)
    for encoder, kind in ((spread_features(3, 21, 151, 1), "feature"), (spread_maps(3, 151, 1), "affinity")):
        stored, streamed = (run(cam, decoder, encoder, encoder_is=kind, streaming=s) for s in (False, True))
        assert torch.equal(stored, streamed)
        matrix = affinity_reference.refining_map(decoder, encoder, encoder_is=kind).matrix
        torch.testing.assert_close(stored, reference.random_walk(matrix, cam), rtol=1e-12, atol=1e-15)


def _case(n: int, classes: int, size: tuple[int, int], target: float | None = None, **options) -> Case:
    def make():
        g = torch.Generator().manual_seed(0)
        affinity, cam = torch.rand(1, n, n, generator=g) ** 4, torch.rand(1, classes, *size, generator=g)
        return (affinity, cam, (torch.rand(1, classes, *size, generator=g) > 0.5).float()), {}

    return Case(f"n{n}_k{classes}", make, target=target, **options)


def _affinity_case(n: int, size: tuple[int, int], as_maps: bool, **options) -> Case:
    def make():
        (decoder, encoder), kwargs = refining_inputs(n, as_maps)
        g = torch.Generator().manual_seed(1)
        cam = torch.rand(1, 5, *size, generator=g)
        return (cam, decoder, encoder, (torch.rand(1, 5, *size, generator=g) > 0.5).float()), kwargs

    return Case(f"n{n}_l6_k5_{'maps' if as_maps else 'c768'}", make, **options)


def walk_bytes(cam, sinkhorn_iter: int = 3, power: int = 2, **_) -> float:
    """Column sums of a chunk per class, the tape, the scratch vectors of a pass, and the masked maps."""
    batch, classes, n = cam.shape[0], cam.shape[1], cam.shape[-2] * cam.shape[-1]
    tape, scratch = 8 * (2 * sinkhorn_iter + 3 * classes * power), 4 * (2 * classes + 1) + 8 * (2 * classes + 2)
    return 1.0 * n * (4 * CHUNKS * classes + scratch + batch * (tape + 8 * classes)) + slice_bytes(cam, n, classes)


def _affinity_walk_bytes(cam, decoder_feature, encoder, mask=None, *, encoder_is="feature", streaming=None, **options) -> float:
    n = encoder.shape[-1]
    streams = n >= api.STREAMING_FROM if streaming is None else streaming
    strips = 4.0 * torch.get_num_threads() * (64 * (n + TILE) + 2 * TILE * TILE)
    return (
        refining_bytes(decoder_feature, encoder, encoder_is=encoder_is, keep=not streams)
        + walk_bytes(cam, **options)
        + (strips if streams else 4.0 * n * n)
    )


def _walk_flops(affinity, cam, mask=None, *, sinkhorn_iter=3, power=2, **_) -> float:
    n = affinity.shape[-1]
    return cam.shape[0] * n * n * (4.0 * sinkhorn_iter + 4.0 * power * cam.shape[1])


SPECS = (
    OpSpec(
        operator=api.WALK_OP,
        public=api.random_walk,
        reference=reference.random_walk,
        paper="M4 section 3.5.5, Eq. 3.16; CLIP-ES, CVPR 2023",
        samples=walk_samples,
        gradients=("affinity", "cam"),
        refused=("mask",),
        autocast="fp32",
        invariants=(mass_is_kept, linear_in_the_cam, steps_compose, order_of_tokens_does_not_matter, an_identity_leaves_the_cam),
        malformed=walk_malformed,
        paths={
            "cpu": ("random_walk.forward", "random_walk.forward.small", "random_walk.backward"),
            "triton": ("random_walk.triton", "random_walk.triton.backward"),
            "cuda": tuple(f"random_walk.cuda.{path}.{way}" for path in ("block", "launches") for way in ("fwd", "bwd")),
        },
        cases=(
            _case(784, 5, (28, 28), 8.0),
            _case(2048, 5, (32, 64), 15.0),
            _case(1024, 21, (32, 32)),
            _case(784, 5, (28, 28), backward=True),
            _case(4096, 5, (64, 64), quick=False),
        ),
        sweeps=(
            Sweep("N", {h * w: _case(h * w, 5, (h, w)) for h, w in ((14, 28), (28, 28), (28, 56), (56, 56))}, 2),
            Sweep("classes", {k: _case(784, k, (28, 28)) for k in (1, 5, 20)}, 1),
        ),
        baselines=("eager", "reordered"),
        flops=_walk_flops,
        bytes_moved=lambda affinity, cam, mask=None, *, sinkhorn_iter=3, power=2, **_: 4.0 * affinity.numel() * (sinkhorn_iter + power),
        peak_bytes=lambda affinity, cam, mask=None, **options: walk_bytes(cam, **options),
    ),
    OpSpec(
        operator=api.AFFINITY_WALK_OP,
        public=api.affinity_random_walk,
        reference=reference.affinity_random_walk,
        paper="M4 Eq. 3.8–3.16",
        samples=affinity_walk_samples,
        gradients=("cam", "decoder_feature", "encoder"),
        refused=("mask",),
        autocast="fp32",
        invariants=(same_bits_stored_and_streaming,),
        malformed=affinity_walk_malformed,
        paths={
            "cpu": (
                "affinity_random_walk.streaming.forward",
                "affinity_random_walk.streaming.backward",
                "refining_map.forward",
                "random_walk.forward",
            ),
            "triton": (
                "affinity_random_walk.triton.streaming",
                "affinity_random_walk.triton.streaming.backward",
                "refining_map.triton",
                "random_walk.triton",
            ),
        },
        cases=(
            _affinity_case(784, (28, 28), False),
            _affinity_case(784, (28, 28), True),
            _affinity_case(4096, (64, 64), False, quick=False, gpu=True),
        ),
        sweeps=(Sweep("N", {n * n: _affinity_case(n * n, (n, n), False) for n in (14, 20, 28)}, 2),),
        baselines=("eager_with_map", "reordered_with_map"),
        flops=lambda cam, decoder_feature, encoder, mask=None, **options: refining_flops(decoder_feature, encoder, **options),
        peak_bytes=_affinity_walk_bytes,
        streaming=True,
    ),
)

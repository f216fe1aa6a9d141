from __future__ import annotations

import torch

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, rand, randn
from . import api, reference

TILE = 128
MOST_KEPT = 2**24
"""Values of all A_l that the CPU kernel keeps between its two passes; beyond it computes them twice."""


def scaled(*size: int, seed: int = 0) -> torch.Tensor:
    """Features whose inner products are of the order of 1, exact in bfloat16."""
    return (randn(*size, seed=seed) / size[-2] ** 0.5).bfloat16().double()


def with_zero_vector(feature: torch.Tensor) -> torch.Tensor:
    feature = feature.clone()
    feature[..., 1] = 0
    return feature


def spread_features(layers: int, channels: int, n: int, batch: int = 2) -> torch.Tensor:
    """Layers that differ clearly in their cosines, so that the gate has a margin in every dtype."""
    common = torch.linspace(0, 3, layers, dtype=torch.float64).view(1, layers, 1, 1)
    return (randn(batch, layers, channels, n, seed=5) + common).bfloat16().double()


def spread_maps(layers: int, n: int, batch: int = 2) -> torch.Tensor:
    """Maps in (−0.1, 1) that differ clearly in their mean."""
    return (
        (rand(batch, layers, n, n, seed=6) ** torch.linspace(0.5, 6, layers, dtype=torch.float64).view(1, -1, 1, 1) - 0.1)
        .bfloat16()
        .double()
    )


def square_samples(**options) -> list[Sample]:
    return [
        Sample("typical", (scaled(2, 7, 13),), options),
        Sample("no leading dimension", (scaled(5, 11),), options),
        Sample("two leading dimensions", (scaled(2, 2, 3, 5),), options),
        Sample("one channel", (rand(1, 1, 9) + 0.5,), options),
        Sample("one token", (scaled(2, 4, 1),), options, gradcheck=False),
        Sample("no channel", (scaled(2, 1, 6)[:, :0],), options),
        Sample("empty batch", (scaled(0, 4, 5),), options),
        Sample("several tiles, prime", (scaled(1, 19, 151),), options, small=False),
        Sample("more channels than a block of the product", (scaled(1, 523, 37),), options, small=False),
    ]


WIDE = (torch.float32, torch.float64)


def lengths(feature: torch.Tensor, *powers: int) -> torch.Tensor:
    """Columns in turn times these powers of two: the cosines are the same."""
    factor = torch.exp2(torch.tensor(powers, dtype=torch.float64))
    return feature * factor[torch.arange(feature.shape[-1]) % len(powers)]


def cosine_samples() -> list[Sample]:
    # one channel or one token: cosines are ±1 whatever the length, so that the true gradient is 0 and only rounding is seen
    return [s for s in square_samples() if s.note not in ("one channel", "one token")] + [
        Sample("clamped", (scaled(2, 7, 13),), {"clamp_min": 0.0}),
        Sample("clamped above 0", (scaled(1, 5, 151),), {"clamp_min": 0.25}, small=False),
        Sample("zero vector (kink)", (with_zero_vector(scaled(2, 5, 9)),), gradcheck=False),
        Sample("lengths at the ends of float32", (lengths(scaled(2, 7, 13), -120, 0, 120),), gradcheck=False, dtypes=WIDE),
        Sample("lengths at the ends of float64", (lengths(scaled(2, 7, 13), -1000, 0, 1000),), gradcheck=False, dtypes=WIDE[1:]),
        Sample("nothing but zeros (kink)", (torch.zeros(1, 3, 4, dtype=torch.float64),), gradcheck=False),
    ]


def sigmoid_samples() -> list[Sample]:
    return [
        *square_samples(),
        Sample("scale", (scaled(2, 7, 13),), {"scale": -0.5}),
        Sample("scale 0", (scaled(1, 3, 5),), {"scale": 0.0}),
        Sample("saturated", (16 * scaled(1, 7, 13),)),
    ]


def deviation_samples() -> list[Sample]:
    same = rand(1, 5, 5)
    return [
        Sample("typical", (rand(2, 13, 13), spread_maps(3, 13))),
        Sample("signed", (rand(2, 13, 13), spread_maps(3, 13)), {"signed": True}),
        Sample("no layer", (rand(2, 5, 5), spread_maps(1, 5)[:, :0])),
        Sample("1×1", (rand(2, 1, 1) + 0.25, rand(2, 3, 1, 1, seed=1) * 0.125)),
        Sample("empty batch", (rand(0, 5, 5), rand(0, 2, 5, 5))),
        Sample("equal maps (kink)", (same, torch.stack([same, same / 2], 1)), gradcheck=False),
        Sample("several blocks, prime", (rand(1, 151, 151), spread_maps(4, 151, 1)), small=False),
    ]


def refining_samples() -> list[Sample]:
    decoder, features, maps = scaled(2, 5, 11), spread_features(4, 6, 11), spread_maps(4, 11)
    identical = spread_features(1, 6, 11).expand(-1, 3, -1, -1)
    as_maps = {"encoder_is": "affinity"}
    return [
        Sample("features", (decoder, features)),
        Sample("maps", (decoder, maps), as_maps),
        Sample("later layers", (decoder, features), {"first_layer": 2}),
        Sample("later maps, signed", (decoder, maps), {**as_maps, "first_layer": 1, "signed": True}),
        Sample("signed", (decoder, features), {"signed": True}),
        Sample("no clamp", (decoder, features), {"clamp_min": None}),
        Sample("maps, no clamp", (decoder, maps), {**as_maps, "clamp_min": None}),
        Sample("clamped above 0", (decoder, features), {"clamp_min": 0.25}),
        Sample("one layer", (decoder, features[:, :1])),
        Sample("identical layers all survive", (decoder, identical)),
        Sample("no decoder", (None, features), {"first_layer": 1}),
        Sample("maps, no decoder", (None, maps), as_maps),
        Sample("one token", (scaled(2, 3, 1), spread_maps(3, 1) + 0.5), as_maps),
        Sample("empty batch", (decoder[:0], features[:0])),
        Sample("zero vector (kink)", (decoder, with_zero_vector(features)), gradcheck=False),
        Sample("lengths at the ends of float32", (decoder, lengths(features, -120, 0, 120)), gradcheck=False, dtypes=WIDE),
        Sample("several tiles, prime", (scaled(1, 9, 151), spread_features(3, 21, 151, 1)), small=False),
        Sample("several tiles of maps, prime", (scaled(1, 9, 151), spread_maps(3, 151, 1)), as_maps, small=False),
    ]


def square_malformed() -> list[Malformed]:
    f = torch.rand(2, 3, 4)
    return [
        Malformed("rank", (f[0, 0],), {}, ValueError, "feature must be a floating-point tensor of shape …×C×N, got float32 of shape 4"),
        Malformed("integers", (f.long(),), {}, TypeError, "feature must be a floating-point tensor .* got int64"),
        Malformed("not a tensor", (None,), {}, TypeError, "feature must be a floating-point tensor .* got None"),
        Malformed("N = 0", (f[..., :0],), {}, ValueError, "a spatial extent must not be 0"),
    ]


def deviation_malformed() -> list[Malformed]:
    a, e = torch.rand(2, 4, 4), torch.rand(2, 3, 4, 4)
    return [
        Malformed("rank", (a[0], e), {}, ValueError, "decoder_affinity must be .* B×N×N, got float32 of shape 4×4"),
        Malformed("encoder rank", (a, a), {}, ValueError, "encoder_affinity must be .* B×L×N×N, got float32 of shape 2×4×4"),
        Malformed("batch", (a[:1], e), {}, ValueError, "must have the same batch size, got 1 and 2"),
        Malformed("not square", (a, e[..., :3]), {}, ValueError, "the rows and the columns of encoder_affinity .* got 4 and 3"),
        Malformed("tokens", (a, e[..., :3, :3]), {}, ValueError, "must have the same number of tokens, got 4 and 3"),
        Malformed("mixed dtypes", (a.double(), e), {}, TypeError, "must have one dtype, got torch.float64 and torch.float32"),
        Malformed("integers", (a, e.long()), {}, TypeError, "encoder_affinity must be a floating-point tensor .* got int64"),
        Malformed("signed", (a, e), {"signed": 1}, TypeError, "signed must be True or False, got 1"),
        Malformed("N = 0", (a[:, :0, :0], e), {}, ValueError, "a spatial extent must not be 0"),
    ]


def refining_malformed(cam: tuple = ()) -> list[Malformed]:
    """For `refining_map`, and with a leading `cam` for `affinity_random_walk`."""
    d, f, maps = torch.rand(2, 3, 6), torch.rand(2, 3, 4, 6), {"encoder_is": "affinity"}
    return [
        Malformed("decoder rank", (*cam, d[0], f), {}, ValueError, "decoder_feature must be .* B×d×N, got float32 of shape 3×6"),
        Malformed("encoder rank", (*cam, d, d), {}, ValueError, "encoder must be .* B×L×C×N, got float32 of shape 2×3×6"),
        Malformed("maps rank", (*cam, d, d), maps, ValueError, "encoder must be .* B×L×N×N, got float32 of shape 2×3×6"),
        Malformed("maps not square", (*cam, d, f), maps, ValueError, "the rows and the columns of encoder .* got 4 and 6"),
        Malformed(
            "encoder_is", (*cam, d, f), {"encoder_is": "map"}, ValueError, "encoder_is must be one of 'feature', 'affinity', got 'map'"
        ),
        Malformed("batch", (*cam, d[:1], f), {}, ValueError, "decoder_feature and encoder must have the same batch size, got 1 and 2"),
        Malformed("tokens", (*cam, d[..., :5], f), {}, ValueError, "must have the same number of tokens, got 5 and 6"),
        Malformed("mixed dtypes", (*cam, d.double(), f), {}, TypeError, "must have one dtype, got torch.float"),
        Malformed("integers", (*cam, d, f.long()), {}, TypeError, "encoder must be a floating-point tensor .* got int64"),
        Malformed("no encoder", (*cam, d, None), {}, TypeError, "encoder must be a floating-point tensor .* got None"),
        Malformed("no layer", (*cam, d, f[:, :0]), {}, ValueError, "encoder must have at least one layer"),
        Malformed("first_layer", (*cam, d, f), {"first_layer": 3}, ValueError, "first_layer must be below the number of layers 3, got 3"),
        Malformed("negative first_layer", (*cam, d, f), {"first_layer": -1}, ValueError, "first_layer must be at least 0, got -1"),
        Malformed("signed", (*cam, d, f), {"signed": "no"}, TypeError, "signed must be True or False, got 'no'"),
        Malformed("NaN clamp", (*cam, d, f), {"clamp_min": float("nan")}, ValueError, "clamp_min must be a finite number, got nan"),
    ]


def symmetric(run) -> None:
    result = run(scaled(2, 5, 150))
    assert torch.equal(result, result.mT)


def lengths_do_not_matter(run) -> None:
    f, length = scaled(1, 5, 12), rand(1, 1, 12, seed=2) + 0.5
    torch.testing.assert_close(run(f * length), run(f), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(run(f).diagonal(dim1=-2, dim2=-1), torch.ones(1, 12, dtype=torch.float64), rtol=1e-14, atol=0)


def zero_vectors_give_zero(run) -> None:
    result = run(with_zero_vector(scaled(1, 5, 9)))
    assert not result[:, 1].any() and not result[:, :, 1].any()


def scale_is_a_factor_of_the_features(run) -> None:
    f = scaled(1, 5, 12)
    torch.testing.assert_close(run(f, scale=4.0), run(2 * f), rtol=1e-14, atol=0)


def equal_affinities_deviate_by_zero(run) -> None:
    a = rand(2, 13, 13)
    assert not run(a, torch.stack([a, a], 1)).any()
    torch.testing.assert_close(run(a, torch.stack([a - 0.25, a + 0.25], 1)), torch.full((2, 2), 169 / 4, dtype=torch.float64))


def one_layer_always_survives(run) -> None:
    for layers in (1, 2, 3, 6, 7):
        same = spread_features(1, 6, 11).expand(-1, layers, -1, -1)
        assert run(scaled(2, 5, 11), same).gate.all()
        assert run(scaled(2, 5, 11), spread_features(layers, 6, 11)).gate.any(-1).all()


def the_map_is_what_the_parts_give(run) -> None:
    decoder, features = scaled(2, 5, 11), spread_features(4, 6, 11)
    result = run(decoder, features, first_layer=1)
    a, e = reference.sigmoid_affinity(decoder), reference.cosine_affinity(features, clamp_min=0.0)
    assert not result.gate[:, 0].any() and result.deviation[:, 0].isnan().all()
    torch.testing.assert_close(result.deviation[:, 1:], reference.affinity_deviation(a, e)[:, 1:], rtol=1e-13, atol=0)
    mean = torch.stack([e[b][result.gate[b]].mean(0) for b in range(2)])
    torch.testing.assert_close(result.matrix, a * mean, rtol=1e-12, atol=1e-15)


def _feature_case(n: int, channels: int, **options) -> Case:
    def make():
        return (torch.randn(1, channels, n, generator=torch.Generator().manual_seed(0)) / channels**0.5,), {}

    return Case(f"n{n}_c{channels}", make, **options)


def refining_inputs(n: int, as_maps: bool):
    g = torch.Generator().manual_seed(0)
    level = torch.linspace(0.2, 2, 6).view(1, 6, 1, 1)
    encoder = torch.rand(1, 6, n, n, generator=g) ** (1 + level) if as_maps else torch.randn(1, 6, 768, n, generator=g) + level
    return (torch.randn(1, 256, n, generator=g) / 16, encoder), {"encoder_is": "affinity"} if as_maps else {}


def _refining_case(n: int, as_maps: bool, **options) -> Case:
    return Case(f"n{n}_l6_{'maps' if as_maps else 'c768'}", lambda: refining_inputs(n, as_maps), **options)


def _deviation_case(n: int) -> Case:
    def make():
        (_, maps), _ = refining_inputs(n, True)
        return (maps[:, 0].contiguous(), maps), {}

    return Case(f"n{n}_l6", make)


def tile_count(n: int) -> int:
    """Tiles on and above the diagonal."""
    return -(-n // TILE) * (-(-n // TILE) + 1) // 2


def packed_bytes(channels: int, n: int) -> float:
    """Features in panels, their norms, and four tiles per thread."""
    return 4.0 * (channels * (n + 32) + n + 4 * TILE * TILE * torch.get_num_threads())


def _square_bytes(feature: torch.Tensor, **_) -> float:
    """On a GPU the unit features of all images, besides their norms."""
    return packed_bytes(*feature.shape[-2:]) + (4.0 * feature.numel() if feature.is_cuda else 0)


def refining_bytes(decoder_feature, encoder, *, encoder_is="feature", keep=True, **_) -> float:
    """Packed features of one image, the deviations' partial sums, and the A_l where they are kept; R itself is the result."""
    n = encoder.shape[-1]
    channels = 0 if decoder_feature is None else decoder_feature.shape[1]
    channels += 0 if encoder_is == "affinity" else encoder.shape[1] * (encoder.shape[2] + 1)
    upper = tile_count(n)
    kept = 0 if encoder_is == "affinity" or decoder_feature is None or not keep else upper * encoder.shape[1] * TILE * TILE
    return packed_bytes(channels, n) + 8.0 * encoder.shape[1] * upper + (4.0 * kept if kept <= MOST_KEPT else 0)


def refining_flops(decoder_feature, encoder, *, encoder_is="feature", **_) -> float:
    """Half of every Gram matrix."""
    n = encoder.shape[-1]
    channels = 0 if decoder_feature is None else decoder_feature.shape[1]
    return 1.0 * encoder.shape[0] * n * n * (channels + (0 if encoder_is == "affinity" else encoder.shape[1] * encoder.shape[2]))


SQUARE = {
    "gradients": ("feature",),
    "flops": lambda feature, **_: float(feature.numel()) * feature.shape[-1],
    "peak_bytes": _square_bytes,
    "paths": {"cpu": ("affinity.forward", "affinity.backward"), "triton": ("affinity.triton", "affinity.triton.backward")},
}
SPECS = (
    OpSpec(
        operator=api.COSINE_OP,
        public=api.cosine_affinity,
        reference=reference.cosine_affinity,
        paper="M4 Eq. 3.8–3.9",
        samples=cosine_samples,
        invariants=(symmetric, lengths_do_not_matter, zero_vectors_give_zero),
        malformed=lambda: [
            *square_malformed(),
            Malformed(
                "NaN clamp", (torch.rand(3, 4),), {"clamp_min": float("nan")}, ValueError, "clamp_min must be a finite number, got nan"
            ),
        ],
        cases=(_feature_case(784, 768), _feature_case(1024, 768), _feature_case(784, 768, backward=True)),
        sweeps=(Sweep("N", {n: _feature_case(n, 768) for n in (196, 392, 784, 1568)}, 2),),
        baselines=("eager_cosine",),
        **SQUARE,
    ),
    OpSpec(
        operator=api.SIGMOID_OP,
        public=api.sigmoid_affinity,
        reference=reference.sigmoid_affinity,
        paper="M4 Eq. 3.11",
        samples=sigmoid_samples,
        invariants=(symmetric, scale_is_a_factor_of_the_features),
        malformed=lambda: [
            *square_malformed(),
            Malformed("scale", (torch.rand(3, 4),), {"scale": "1"}, TypeError, "scale must be a number, got '1'"),
        ],
        cases=(_feature_case(784, 256), _feature_case(1024, 256), _feature_case(784, 256, backward=True)),
        sweeps=(Sweep("N", {n: _feature_case(n, 256) for n in (196, 392, 784, 1568)}, 2),),
        baselines=("eager_sigmoid",),
        **SQUARE,
    ),
    OpSpec(
        operator=api.DEVIATION_OP,
        public=api.affinity_deviation,
        reference=reference.affinity_deviation,
        paper="M4 Eq. 3.12",
        samples=deviation_samples,
        gradients=("decoder_affinity", "encoder_affinity"),
        float32_outputs=(0,),
        invariants=(equal_affinities_deviate_by_zero,),
        malformed=deviation_malformed,
        paths={
            "cpu": ("affinity_deviation.forward", "affinity_deviation.backward"),
            "triton": ("affinity_deviation.triton", "affinity_deviation.triton.backward"),
        },
        cases=(_deviation_case(784),),
        sweeps=(Sweep("N", {n: _deviation_case(n) for n in (196, 392, 784, 1568)}, 2),),
        baselines=("eager_deviation",),
        flops=lambda decoder_affinity, encoder_affinity, **_: 3.0 * encoder_affinity.numel(),
        bytes_moved=lambda decoder_affinity, encoder_affinity, **_: 4.0 * (decoder_affinity.numel() + encoder_affinity.numel()),
        peak_bytes=lambda decoder_affinity, encoder_affinity, **_: float(encoder_affinity.shape[:2].numel() * encoder_affinity.shape[-1]),
    ),
    OpSpec(
        operator=api.REFINING_OP,
        public=api.refining_map,
        reference=reference.refining_map,
        paper="M4 Eq. 3.8–3.15; WeCLIP, CVPR 2024 (signed)",
        samples=refining_samples,
        gradients=("decoder_feature", "encoder"),
        float32_outputs=(2,),
        invariants=(one_layer_always_survives, the_map_is_what_the_parts_give),
        malformed=refining_malformed,
        paths={
            "cpu": ("refining_map.forward", "refining_map.backward"),
            "triton": ("refining_map.triton", "refining_map.triton.backward"),
        },
        cases=(
            _refining_case(784, False),
            _refining_case(784, True),
            _refining_case(784, False, backward=True, quick=False),
            _refining_case(4096, False, quick=False, gpu=True),
        ),
        sweeps=(Sweep("N", {n: _refining_case(n, False) for n in (196, 392, 784)}, 2),),
        baselines=("eager_refining_map",),
        flops=refining_flops,
        peak_bytes=refining_bytes,
    ),
)

from __future__ import annotations

import torch

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randn
from . import api, reference


def _exact(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.bfloat16).double()


def _side(rows: int, features: int, semantic: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        randn(rows, semantic, seed=seed),
        randn(rows, features, seed=seed + 1),
        randn(rows, features, seed=seed + 2).exp().bfloat16().double(),
    )


def _both(rows: int, columns: int, features: int, semantic: int) -> tuple[torch.Tensor, ...]:
    return *_side(rows, features, semantic, 0), *_side(columns, features, semantic, 10)


def _constants() -> dict[str, torch.Tensor]:
    return {"a": _exact(0.0625), "b": _exact(0.5), "lam": _exact(0.25)}


def distance_samples() -> list[Sample]:
    def gaussians(rows, columns, features, offset=0.0):
        _, mu_x, sigma_x, _, mu_y, sigma_y = _both(rows, columns, features, 1)
        return mu_x + offset, sigma_x, mu_y + offset, sigma_y

    return [
        Sample("typical", gaussians(7, 5, 3)),
        Sample("offset", gaussians(7, 5, 3, 64.0), dtypes=(torch.float32, torch.float64)),
        Sample("equal", (*gaussians(6, 6, 4)[:2], *gaussians(6, 6, 4)[:2])),
        Sample("one pair", gaussians(1, 1, 1)),
        Sample("no row", gaussians(0, 5, 3)),
        Sample("no column", gaussians(4, 0, 3)),
        Sample("nothing", gaussians(0, 0, 3)),
        Sample("several blocks", gaussians(131, 307, 37), small=False),
        Sample("long rows", gaussians(67, 70, 300), small=False),
        Sample("wide blocks", gaussians(70, 2111, 9), small=False),
    ]


def similarity_samples() -> list[Sample]:
    near = _both(6, 6, 3, 4)
    zero = list(_both(7, 5, 3, 4))
    zero[0] = zero[0] * (torch.arange(7) % 3 > 0)[:, None]
    zero[3] = zero[3] * (torch.arange(5) % 4 > 0)[:, None]
    return [
        Sample("typical", _both(7, 5, 3, 4), _constants()),
        Sample("defaults", _both(7, 5, 3, 4)),
        Sample("numbers", _both(7, 5, 3, 4), {"a": 0.1, "b": 0.0, "lam": 0.3}),
        Sample("no uncertainty", _both(7, 5, 3, 4), {"a": 0.0, "b": 0.0, "lam": 0.2}),
        Sample("negative offset", _both(7, 5, 3, 4), {"a": 0.01, "b": -1.0, "lam": 0.2}),
        Sample("equal sides", (*near[:3], *near[:3]), gradcheck=False),
        Sample("zero vectors", tuple(zero), _constants(), gradcheck=False),
        Sample("one pair", _both(1, 1, 1, 2), _constants()),
        Sample("no row", _both(0, 5, 3, 4), _constants()),
        Sample("no column", _both(4, 0, 3, 4), _constants()),
        Sample("several blocks", _both(131, 307, 37, 21), _constants(), small=False),
        Sample("long rows", _both(67, 70, 150, 300), {"a": 1 / 200, "b": 4.0, "lam": 0.2}, small=False),
    ]


def loss_samples() -> list[Sample]:
    zero = list(_both(7, 7, 3, 4))
    zero[0] = zero[0] * (torch.arange(7) % 3 > 0)[:, None]
    return [
        Sample("typical", (*_both(7, 7, 3, 4), _exact(0.25)), _constants()),
        Sample("defaults", (*_both(7, 7, 3, 4), 0.07)),
        Sample("numbers", (*_both(9, 9, 3, 4), 0.5), {"a": 0.1, "b": 0.0, "lam": 0.3}),
        Sample("no uncertainty", (*_both(7, 7, 3, 4), 0.5), {"a": 0.0, "b": 0.0, "lam": 0.2}),
        Sample("sharp", (*_both(7, 7, 3, 4), 0.004), {"a": 0.0, "b": 0.01, "lam": 0.2}, gradcheck=False),
        Sample("zero vectors", (*zero, _exact(0.25)), _constants(), gradcheck=False),
        Sample("one pair", (*_both(1, 1, 3, 4), _exact(0.25)), _constants()),
        Sample("empty", (*_both(0, 0, 3, 4), _exact(0.25)), _constants()),
        Sample("products kept", (*_both(67, 67, 37, 21), _exact(0.25)), _constants(), small=False),
        Sample("products made again", (*_both(331, 331, 5, 7), _exact(0.25)), _constants(), small=False),
        Sample("several groups", (*_both(1201, 1201, 3, 8), 0.25), {"a": 0.05, "b": 0.5, "lam": 0.2}, small=False),
    ]


def distance_malformed() -> list[Malformed]:
    mu, sigma = torch.rand(4, 3), torch.rand(4, 3)
    return [
        Malformed(
            "rank", (mu[0], sigma, mu, sigma), {}, ValueError, "mu_x must be a floating-point tensor of shape N×d, got float32 of shape 3"
        ),
        Malformed("integer", (mu, sigma.long(), mu, sigma), {}, TypeError, "sigma_x must be a floating-point tensor .* got int64"),
        Malformed("not a tensor", (mu, sigma, [1.0], sigma), {}, TypeError, "mu_y must be a floating-point tensor .* got list"),
        Malformed(
            "shapes", (mu, sigma[:3], mu, sigma), {}, ValueError, r"mu_x and sigma_x must have the same shape, got \(4, 3\) and \(3, 3\)"
        ),
        Malformed(
            "features",
            (mu, sigma, mu[:, :2], sigma[:, :2]),
            {},
            ValueError,
            "mu_x and mu_y must have the same number of features, got 3 and 2",
        ),
        Malformed("no feature", (mu[:, :0],) * 4, {}, ValueError, "mu_x must have at least one feature"),
        Malformed("dtypes", (mu, sigma, mu.double(), sigma), {}, TypeError, "mu_x and mu_y must have one dtype"),
    ]


def similarity_malformed() -> list[Malformed]:
    t = torch.rand(4, 3)
    six = (t,) * 6
    return [
        Malformed("rank", (t[0], *six[1:]), {}, ValueError, "sem_x must be a floating-point tensor of shape N×D, got float32 of shape 3"),
        Malformed("length", (t[:3], *six[1:]), {}, ValueError, "sem_x and mu_x must have the same length, got 3 and 4"),
        Malformed("features", (t[:, :2], *six[1:]), {}, ValueError, "sem_x and sem_y must have the same number of features, got 2 and 3"),
        Malformed("no feature", (t[:, :0], t, t, t[:, :0], t, t), {}, ValueError, "sem_x must have at least one feature"),
        Malformed("dtypes", (*six[:5], t.double()), {}, TypeError, "sem_x and sigma_y must have one dtype"),
        Malformed("NaN", six, {"a": float("nan")}, ValueError, "a must be a finite number, got nan"),
        Malformed("text", six, {"b": "4"}, TypeError, "b must be a number, got '4'"),
        Malformed(
            "vector",
            six,
            {"lam": t[0]},
            TypeError,
            r"lam must be a number or a floating-point tensor of shape \(\), got float32 of shape 3",
        ),
    ]


def loss_malformed() -> list[Malformed]:
    t = torch.rand(4, 3)
    six = (t,) * 6
    return [
        Malformed("rank", (t[0], *six[1:], 0.1), {}, ValueError, "sem_x must be a floating-point tensor of shape N×D"),
        Malformed(
            "not square", (*six[:3], t[:3], t[:3], t[:3], 0.1), {}, ValueError, "sem_x and sem_y must have the same length, got 4 and 3"
        ),
        Malformed("temperature", (*six, 0.0), {}, ValueError, "temperature must be a positive finite number, got 0.0"),
        Malformed("temperature dtype", (*six, torch.tensor(0.1).double()), {}, TypeError, "temperature must have the dtype"),
        Malformed("infinity", (*six, 0.1), {"b": float("inf")}, ValueError, "b must be a finite number, got inf"),
    ]


def distance_of_equal_gaussians_is_zero(run) -> None:
    mu, sigma = randn(9, 6) + 100, randn(9, 6, seed=1).exp()
    torch.testing.assert_close(run(mu, sigma, mu, sigma).diagonal(), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12)


def distance_is_symmetric(run) -> None:
    mu_x, sigma_x, mu_y, sigma_y = randn(9, 6), randn(9, 6, seed=1).exp(), randn(5, 6, seed=2), randn(5, 6, seed=3).exp()
    torch.testing.assert_close(run(mu_x, sigma_x, mu_y, sigma_y), run(mu_y, sigma_y, mu_x, sigma_x).T, rtol=1e-12, atol=0)


def root_of_the_distance_obeys_the_triangle_inequality(run) -> None:
    mu, sigma = randn(25, 3), randn(25, 3, seed=1).exp()
    root = run(mu, sigma, mu, sigma).sqrt()
    assert bool((root[:, None, :] <= root[:, :, None] + root[None] + 1e-6).all())


def offset_does_not_matter(run) -> None:
    mu_x, sigma_x, mu_y, sigma_y = randn(9, 6), randn(9, 6, seed=1).exp(), randn(5, 6, seed=2), randn(5, 6, seed=3).exp()
    torch.testing.assert_close(run(mu_x + 1e6, sigma_x, mu_y + 1e6, sigma_y), run(mu_x, sigma_x, mu_y, sigma_y), rtol=1e-8, atol=0)


def similarity_of_near_rows_is_one(run) -> None:
    sem, mu, sigma = _side(6, 3, 4, 0)
    near = run(sem, mu, sigma, sem * 2 + 1e-9, mu, sigma).diagonal()
    torch.testing.assert_close(near, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)


def similarity_without_uncertainty_is_the_cosine(run) -> None:
    args = _both(6, 5, 3, 4)
    cosine = torch.nn.functional.normalize(args[0], dim=1) @ torch.nn.functional.normalize(args[3], dim=1).T
    torch.testing.assert_close(run(*args, a=0.0, b=1e-14), cosine, rtol=0, atol=1e-12)
    assert bool((run(*args) >= cosine).all())


def loss_is_the_cross_entropy_of_the_similarity(run) -> None:
    from .api import uncertainty_similarity

    args = _both(11, 11, 3, 4)
    logits = uncertainty_similarity(*args, backend="reference") / 0.07
    target = torch.arange(11)
    expected = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(run(*args, 0.07), expected, rtol=1e-11, atol=0)


def _inputs(rows: int, features: int) -> tuple[torch.Tensor, ...]:
    g = generator(0)
    return tuple(torch.randn(rows, features, generator=g) for _ in range(6))


def _loss_case(rows: int, features: int, target: float | None, baselines: tuple[str, ...], gpu: bool = False) -> Case:
    return Case(
        f"n{rows}_d{features}",
        lambda: ((*_inputs(rows, features), 0.07), {}),
        backward=True,
        quick=False,
        gpu=gpu,
        target=target,
        baselines=baselines,
    )


def _padded(rows: int, depth: int, size: int) -> float:
    return (rows + 256) * (depth + 64) * size


def _distance_peak(mu_x, sigma_x, mu_y, sigma_y) -> float:
    """Centred rows of both sides, packed columns and tiles of each thread."""
    size, depth = mu_x.element_size(), 2 * mu_x.shape[1]
    return _padded(mu_x.shape[0], depth, size) + _padded(mu_y.shape[0], depth, size) + 16 * (128 * depth + 16384) * size


def _similarity_peak(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, **_) -> float:
    """As for the distance; on a GPU also a strip of both products (16 MiB, at least 128 rows)."""
    size, depth, rows, columns = mu_x.element_size(), 2 * mu_x.shape[1] + sem_x.shape[1], mu_x.shape[0], mu_y.shape[0]
    strip = min(rows, max(128, (8 << 20) // (size * max(1, columns)))) if mu_x.is_cuda else 0
    return _padded(rows, depth, size) + _padded(columns, depth, size) + 16 * (128 * depth + 16384) * size + 2.0 * strip * columns * size


def _loss_peak(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, temperature, **_) -> float:
    """As for the similarity, and 32 partial statistics of every row; on a GPU one for every 32 rows of a strip and for shares of columns."""
    return _similarity_peak(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y) + (800 if mu_x.is_cuda else 400) * mu_x.shape[0]


_SIX = ("sem_x", "mu_x", "sigma_x", "sem_y", "mu_y", "sigma_y")

SPECS = (
    OpSpec(
        operator=api.WASSERSTEIN_OP,
        public=api.wasserstein2,
        reference=reference.wasserstein2,
        paper="M1 Eq. 1",
        samples=distance_samples,
        gradients=("mu_x", "sigma_x", "mu_y", "sigma_y"),
        float32_outputs=(0,),
        invariants=(
            distance_of_equal_gaussians_is_zero,
            distance_is_symmetric,
            root_of_the_distance_obeys_the_triangle_inequality,
            offset_does_not_matter,
        ),
        malformed=distance_malformed,
        paths={
            "cpu": ("wasserstein.distance",),
            "triton": ("wasserstein.triton", "wasserstein.triton.rows", "wasserstein.triton.backward"),
        },
        cases=(Case("n256_d512", lambda: (_inputs(256, 512)[:4], {})),),
        sweeps=(Sweep("N", {n: Case(f"n{n}_d512", lambda n=n: (_inputs(n, 512)[:4], {})) for n in (64, 128, 256, 512)}, 2),),
        baselines=("distance_eager", "distance_product"),
        flops=lambda mu_x, sigma_x, mu_y, sigma_y: 4.0 * mu_x.numel() * mu_y.shape[0],
        bytes_moved=lambda mu_x, sigma_x, mu_y, sigma_y: 8.0 * (mu_x.numel() + mu_y.numel()),
        peak_bytes=_distance_peak,
    ),
    OpSpec(
        operator=api.SIMILARITY_OP,
        public=api.uncertainty_similarity,
        reference=reference.uncertainty_similarity,
        paper="M1 Eq. 2–5",
        samples=similarity_samples,
        gradients=(*_SIX, "a", "b", "lam"),
        invariants=(similarity_of_near_rows_is_one, similarity_without_uncertainty_is_the_cosine),
        malformed=similarity_malformed,
        paths={
            "cpu": ("wasserstein.similarity",),
            "triton": (
                "uncertainty.triton",
                "uncertainty.triton.rows",
                "uncertainty.triton.backward",
                "uncertainty.triton.backward.gradients",
            ),
        },
        cases=(Case("n256_d512", lambda: (_inputs(256, 512), {}), backward=True),),
        sweeps=(Sweep("N", {n: Case(f"n{n}_d512", lambda n=n: (_inputs(n, 512), {}), backward=True) for n in (64, 128, 256)}, 2),),
        baselines=("similarity_eager", "similarity_product"),
        flops=lambda sem_x, mu_x, *_, **__: 2.0 * (2 * mu_x.numel() + sem_x.numel()) * _[1].shape[0],
        bytes_moved=lambda sem_x, mu_x, *_, **__: 8.0 * (sem_x.numel() + 2 * mu_x.numel()),
        peak_bytes=_similarity_peak,
    ),
    OpSpec(
        operator=api.LOSS_OP,
        public=api.uncertainty_info_nce,
        reference=reference.uncertainty_info_nce,
        paper="M1 Eq. 6–8",
        samples=loss_samples,
        gradients=(*_SIX, "temperature", "a", "b", "lam"),
        float32_outputs=(0,),
        invariants=(loss_is_the_cross_entropy_of_the_similarity,),
        malformed=loss_malformed,
        paths={
            "cpu": ("wasserstein.loss",),
            "triton": (
                "uncertainty_info_nce.triton",
                "uncertainty_info_nce.triton.rows",
                "uncertainty_info_nce.triton.merge",
                "uncertainty_info_nce.triton.backward",
                "uncertainty_info_nce.triton.backward.gradients",
            ),
        },
        cases=(
            _loss_case(256, 512, 100.0, ("eager", "matrix_product")),
            _loss_case(1024, 512, 2.0, ("matrix_product",)),
            _loss_case(4096, 512, None, ("matrix_product",), gpu=True),
            Case("n128_d128", lambda: ((*_inputs(128, 128), 0.07), {}), backward=True),
        ),
        sweeps=(Sweep("N", {n: Case(f"n{n}_d512", lambda n=n: ((*_inputs(n, 512), 0.07), {}), backward=True) for n in (64, 128, 256)}, 2),),
        baselines=("eager", "matrix_product"),
        flops=lambda sem_x, mu_x, *_, **__: 2.0 * (2 * mu_x.numel() + sem_x.numel()) * mu_x.shape[0],
        bytes_moved=lambda sem_x, mu_x, *_, **__: 8.0 * (sem_x.numel() + 2 * mu_x.numel()),
        peak_bytes=_loss_peak,
        streaming=True,
    ),
)

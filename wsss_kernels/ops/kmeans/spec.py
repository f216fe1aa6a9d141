from __future__ import annotations

import torch

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randint, randn
from . import api, reference


def _blobs(batch: int, count: int, depth: int, k: int, seed: int = 0) -> torch.Tensor:
    """Clusters far enough apart that no rounding moves a point to another one."""
    centre = 8 * torch.eye(max(k, depth), dtype=torch.float64)[:k, :depth] + 12 * torch.arange(k)[:, None] * (depth < k)
    label = randint(k, batch, count, seed=seed)
    label[:, :k] = torch.arange(k)
    return (centre[label] + 0.5 * randn(batch, count, depth, seed=seed + 1)).bfloat16().double()


def samples() -> list[Sample]:
    x = _blobs(2, 23, 5, 3)
    line = torch.tensor([[[0.0], [1.0], [2.0], [10.0]]], dtype=torch.float64)
    long, wide = _blobs(2, 4099, 1, 2), randn(1, 66, 130)
    return [
        Sample("typical", (x, 3)),
        Sample("init", (x, 2), {"init": x[:, [1, 0]]}),
        Sample("no iteration", (x, 3), {"num_iter": 0}),
        Sample("one iteration", (x, 3), {"num_iter": 1}),
        Sample("tolerance", (x, 3), {"tol": 4.0}),
        Sample("one cluster", (x, 1)),
        Sample("a cluster per point", (x[:, :5], 5)),
        Sample("tie", (line[:, :3], 2), {"init": line[:, [0, 2]], "num_iter": 0}),
        Sample("empty cluster", (line, 3), {"init": torch.tensor([[[0.0], [100.0], [10.0]]], dtype=torch.float64)}),
        Sample("equal centroids", (line, 2), {"init": torch.tensor([[[3.0], [3.0]]], dtype=torch.float64), "num_iter": 1}),
        Sample("1 point", (randn(2, 1, 3), 1)),
        Sample("empty batch", (x[:0], 3)),
        Sample("more points than a block takes", (long, 2), {"num_iter": 2, "tol": 1.0}),
        Sample("more sums than a block takes", (wide, 64), {"init": wide[:, :64], "num_iter": 1}),
        Sample("many clusters", (_blobs(1, 331, 11, 11), 11), small=False),
        Sample("several shares", (_blobs(1, 3001, 7, 4), 4), small=False),
        Sample("several sets", (_blobs(3, 1201, 16, 2), 2), small=False),
    ]


def malformed() -> list[Malformed]:
    x = torch.rand(2, 6, 3)
    return [
        Malformed("rank", (x[0], 2), {}, ValueError, "x must be a floating-point tensor of shape B×N×d, got float32 of shape 6×3"),
        Malformed("integer", (x.long(), 2), {}, TypeError, "x must be a floating-point tensor .* got int64"),
        Malformed("k 0", (x, 0), {}, ValueError, "k must be at least 1, got 0"),
        Malformed("k > N", (x, 7), {}, ValueError, "k must be at most the number of points, 6, got 7"),
        Malformed("float k", (x, 2.0), {}, TypeError, "k must be an int, got 2.0"),
        Malformed("no feature", (x[..., :0], 2), {}, ValueError, "x must have at least one feature"),
        Malformed(
            "init",
            (x, 2),
            {"init": x[:, :3]},
            ValueError,
            r"init and the centroids must have the same shape, got \(2, 3, 3\) and \(2, 2, 3\)",
        ),
        Malformed("init dtype", (x, 2), {"init": x[:, :2].double()}, TypeError, "x and init must have one dtype"),
        Malformed("num_iter", (x, 2), {"num_iter": -1}, ValueError, "num_iter must be at least 0, got -1"),
        Malformed("tol", (x, 2), {"tol": -0.5}, ValueError, "tol must be at least 0, got -0.5"),
        Malformed("NaN", (x, 2), {"tol": float("nan")}, ValueError, "tol must be a finite number, got nan"),
    ]


def _objective(x: torch.Tensor, label: torch.Tensor, centroid: torch.Tensor) -> torch.Tensor:
    return (x - centroid.gather(1, label[..., None].expand(-1, -1, x.shape[2]))).square().sum(dim=(1, 2))


def objective_never_increases(run) -> None:
    x = randn(3, 200, 4)
    values = torch.stack([_objective(x, *run(x, 5, num_iter=i)) for i in range(12)])
    assert bool((values[1:] <= values[:-1] * (1 + 1e-12)).all())


def labels_are_those_of_the_returned_centroids(run) -> None:
    x = randn(3, 200, 4)
    label, centroid = run(x, 5, num_iter=3)
    assert torch.equal(label, torch.cdist(x, centroid).argmin(dim=-1))


def sets_do_not_influence_each_other(run) -> None:
    x = torch.cat([randn(1, 50, 3), 100 + randn(1, 50, 3, seed=1)])
    label, centroid = run(x, 4)
    for b in range(2):
        alone = run(x[b : b + 1], 4)
        assert torch.equal(label[b : b + 1], alone[0]) and torch.equal(centroid[b : b + 1], alone[1])


def empty_cluster_keeps_its_centroid(run) -> None:
    x, far = randn(1, 30, 2), torch.tensor([[[0.0, 0.0], [1e3, 1e3]]], dtype=torch.float64)
    label, centroid = run(x, 2, init=far)
    assert bool((label == 0).all()) and torch.equal(centroid[0, 1], far[0, 1])


def _case(batch: int, count: int, depth: int, k: int, *, quick: bool = True, target: float | None = None) -> Case:
    def make():
        return (torch.randn(batch, count, depth, generator=generator(0)), k), {"num_iter": 20}

    return Case(f"{batch}x{count}x{depth}_k{k}", make, quick=quick, target=target)


def _peak(x, k, **_) -> float:
    """Packed points, and sums of each share, at most one in max(1024, 8k) points."""
    sets = 1 if x.shape[1] > 8192 else min(16, x.shape[0])
    shares = x.shape[1] // max(1024, 8 * k) + 1
    return (
        sets * ((x.shape[1] + 64) * x.shape[2] * x.element_size() + 8 * shares * k * (x.shape[2] + 1)) + 2 * x.shape[0] * k * x.shape[2] * 4
    )


SPECS = (
    OpSpec(
        operator=api.KMEANS_OP,
        public=api.kmeans,
        reference=reference.kmeans,
        paper="M3 §3; Lloyd",
        samples=samples,
        refused=("x", "init"),
        invariants=(
            objective_never_increases,
            labels_are_those_of_the_returned_centroids,
            sets_do_not_influence_each_other,
            empty_cluster_keeps_its_centroid,
        ),
        malformed=malformed,
        paths={
            "cpu": ("kmeans.cpu",),
            "cuda": ("kmeans.cuda.block", "kmeans.cuda.shares", "kmeans.cuda.shares.sums_in_memory"),
        },
        cases=(_case(1, 65536, 16, 2, target=15.0), _case(8, 4096, 16, 2)),
        sweeps=(
            Sweep("N", {n: _case(1, n, 16, 2) for n in (4096, 16384, 65536)}, 1),
            Sweep("clusters", {k: _case(1, 16384, 16, k) for k in (2, 4, 8, 16)}, 1),
        ),
        baselines=("eager", "batched"),
        flops=lambda x, k, **_: 60.0 * k * x.numel(),
        bytes_moved=lambda x, k, **_: 80.0 * x.numel(),
        peak_bytes=_peak,
    ),
)

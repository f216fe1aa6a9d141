"""The baselines of the benchmark."""

import types

import pytest
import torch

from benchmarks import test_cpu
from benchmarks.baselines import kmeans, random_walk
from wsss_kernels import registry
from wsss_kernels._spec import Case, rand
from wsss_kernels.bench import timing
from wsss_kernels.bench.row import MODES
from wsss_kernels.testing import flatten, gradient_tensors

CHEAP = (
    "box_mask",
    "connected_components",
    "purified_label_loss",
    "window_attention",
    "exchange_attention",
    "normalize_cam",
    "mpfp",
    "sinkhorn",
)


@pytest.mark.parametrize("name", [pytest.param(s.name, marks=[] if s.name in CHEAP else pytest.mark.slow) for s in registry.specs()])
def test_baselines_stay_on_the_device_of_their_arguments(name):
    """What they make without naming a device would lie beside a GPU's tensors: here on `meta`, which the arguments are not."""
    spec = registry.spec(name)
    case = next(case for case in spec.cases if case.quick)
    args, kwargs = case.make()
    kwargs.pop("exact", None)
    for baseline in timing.baselines(spec, case).values():
        with torch.no_grad(), torch.device("meta"):
            results = flatten(baseline(*args, **kwargs))
        assert {t.device.type for t in results} == {"cpu"}


@pytest.mark.parametrize("name", ["box_mask", "connected_components"])
def test_baselines_of_numpy_take_what_a_gpu_gives(name, monkeypatch):
    """`.numpy()` raises for a tensor on a GPU; `.cpu()` must come before it."""
    spec = registry.spec(name)
    case = next(case for case in spec.cases if case.quick)
    args, kwargs = case.make()
    copied, cpu, numpy = [], torch.Tensor.cpu, torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: copied.append(True) or cpu(t))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda t: numpy(t) if copied else pytest.fail(".numpy() before .cpu()"))
    for baseline in timing.baselines(spec, case).values():
        copied.clear()
        baseline(*args, **kwargs)


@pytest.mark.parametrize("name", ["mpfp", "normalize_cam", "box_mask"])
def test_pytest_benchmark_times_the_gradients_that_a_case_is_meant_with(name):
    spec = registry.spec(name)
    for case in [case for case in spec.cases if case.quick]:
        calls = []
        benchmark = types.SimpleNamespace(pedantic=lambda call, calls=calls, **more: calls.append(call()))
        test_cpu.test_speed(benchmark, spec, case)
        args, kwargs = case.make()
        gradients = len(gradient_tensors(spec, None, args, kwargs)) if case.backward else 0
        assert len(calls[0]) == len(flatten(spec.public(*args, **kwargs))) + gradients


def test_the_baselines_of_par_have_the_gradient_of_the_mask(monkeypatch):
    monkeypatch.setattr(timing, "peaks", lambda: (1.0, 1.0))
    spec = registry.spec("par")
    case = Case("small", lambda: ((rand(1, 3, 9, 8).float(), rand(1, 2, 9, 8, seed=1).float()), {"dilations": (1, 2), "num_iter": 2}))
    for mode in MODES:
        assert [(r.provider, r.gate) for r in timing.measure(spec, case, seconds=0.01, mode=mode)] == [
            ("ours", "green"),
            ("eager", "green"),
            ("pad_and_slice", "green"),
        ]


def test_the_rewrite_of_the_random_walk_walks_the_same():
    spec = registry.spec("random_walk")
    assert "reordered" in spec.baselines and "reordered_with_map" in registry.spec("affinity_random_walk").baselines
    affinity, cam, mask = torch.rand(2, 30, 30), torch.rand(2, 3, 5, 6), torch.rand(2, 3, 5, 6)
    for options in ({}, {"sinkhorn_iter": 1, "power": 3}):
        torch.testing.assert_close(random_walk.reordered(affinity, cam, mask, **options), random_walk.eager(affinity, cam, mask, **options))
    torch.testing.assert_close(random_walk.reordered(affinity, cam), random_walk.eager(affinity, cam))


def test_the_rewrite_of_kmeans_finds_the_same():
    assert "batched" in registry.spec("kmeans").baselines
    x = torch.randn(3, 200, 4, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"num_iter": 3}, {"tol": 0.05}, {"init": x[:, :5] + 0.1}):
        for ours, expected in zip(kmeans.batched(x, 5, **options), kmeans.eager(x, 5, **options), strict=True):
            torch.testing.assert_close(ours, expected)

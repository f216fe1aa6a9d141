"""Every operator × backend × dtype × sample against the float64 reference, in poisoned memory, twice for equal bits."""

import pytest
import torch
from conftest import backend_params, sample_params

from wsss_kernels import registry
from wsss_kernels.testing import (
    DTYPES,
    HALVES,
    arguments,
    assert_matches_truth,
    cast,
    flatten,
    launch_paths,
    map_tensors,
    poisoned_allocations,
    threads,
)


def expected(spec, sample, dtype):
    """(truth, float32 reference) for the sample's values rounded to the dtype."""
    args, kwargs = cast((sample.args, dict(sample.kwargs)), dtype)
    with torch.no_grad():
        truth = spec.reference(*cast(args, torch.float64), **cast(kwargs, torch.float64))
        coarse = spec.reference(*cast(args, torch.float32), **cast(kwargs, torch.float32))
    return flatten(truth), flatten(coarse)


def equal(a, b):
    return (
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        if a.is_floating_point()
        else torch.equal(a, b)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("spec", "backend", "device", "sample"), sample_params())
def test_matches_truth(spec, backend, device, sample, dtype):
    if dtype not in sample.dtypes:
        pytest.skip(f"the sample {sample.note!r} is meant for other dtypes")
    truth, coarse = expected(spec, sample, dtype)
    args, kwargs = cast((sample.args, dict(sample.kwargs)), dtype, device)
    before = cast((args, kwargs), dtype)
    with poisoned_allocations(), torch.no_grad():
        result = flatten(spec.public(*args, **kwargs, backend=backend))
    with torch.no_grad(), threads(1):
        again = flatten(spec.public(*args, **kwargs, backend=backend))
    assert len(result) == len(truth)
    for i, (actual, wanted, ref) in enumerate(zip(result, truth, coarse, strict=True)):
        if wanted.is_floating_point():
            assert actual.dtype == (torch.float32 if dtype in HALVES and spec.widens(i) else dtype)
        if spec.outputs == "exact":
            assert torch.equal(actual.cpu().double(), wanted.double())
        else:
            bound = sample.bound(wanted, *cast(args, torch.float64, "cpu")) if sample.bound else None
            if bound is not None and dtype in HALVES:
                bound += torch.finfo(dtype).eps * float(wanted.abs().max())  # the result is rounded to the dtype
            assert_matches_truth(
                actual, wanted, ref, actual.dtype if actual.is_floating_point() else dtype, bound=bound, what=f"output {i}"
            )
        assert equal(actual, again[i]), f"output {i}: other bits on a repeat with one thread"
    for given, kept in zip(flatten((args, kwargs)), flatten(before), strict=True):
        assert equal(given, kept), "an input was changed"


@pytest.mark.parametrize(("spec", "backend", "device"), backend_params(with_reference=True))
def test_invariants(spec, backend, device):
    def run(*args, **kwargs):
        result = spec.public(*cast(args, torch.float64, device), **cast(kwargs, torch.float64, device), backend=backend)
        return map_tensors(result, lambda t: t.cpu())

    for law in spec.invariants:
        law(run)


@pytest.mark.parametrize(("spec", "bad"), [pytest.param(s, b, id=f"{s.name}-{b.note}") for s in registry.specs() for b in s.malformed()])
def test_malformed(spec, bad):
    with pytest.raises(bad.error, match=bad.match) as caught:
        spec.public(*bad.args, **bad.kwargs)
    assert type(caught.value) is bad.error and str(caught.value).startswith(f"{spec.name}: ")


@pytest.mark.parametrize(("spec", "backend", "device"), backend_params())
def test_autocast(spec, backend, device):
    sample = spec.samples()[0]
    args, kwargs = cast((sample.args, dict(sample.kwargs)), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16), torch.no_grad():
        result = flatten(spec.public(*args, **kwargs, backend=backend))
    for i, t in enumerate(result):
        if t.is_floating_point():
            assert t.dtype == (torch.float32 if spec.autocast == "fp32" or spec.widens(i) else torch.bfloat16)
    if spec.autocast == "fp32":
        with torch.no_grad():
            plain = flatten(spec.public(*args, **kwargs, backend=backend))
        assert all(equal(a, b) for a, b in zip(result, plain, strict=True))


@pytest.mark.parametrize(("spec", "backend", "device"), backend_params())
def test_every_launch_path_is_taken(spec, backend, device):
    for sample in spec.samples():
        if not sample.small and device == "cpu" and backend != "cpu":
            continue
        for dtype in sample.dtypes:
            args, kwargs = cast((sample.args, dict(sample.kwargs)), dtype, device)
            named = arguments(spec.reference, args, kwargs)
            for name in spec.gradients:
                for t in flatten(named.get(name)):
                    t.requires_grad_(t.is_floating_point())
            result = [t for t in flatten(spec.public(*args, **kwargs, backend=backend)) if t.requires_grad]
            if result:
                torch.autograd.backward(result, [torch.ones_like(t) for t in result])
    missed = set(spec.paths.get(backend, ())) - launch_paths()
    assert not missed, f"no sample takes {sorted(missed)}"

"""Gradients: against the float64 reference in every dtype, for every subset of inputs, gradcheck, refusals."""

import itertools

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
    gradient_tensors,
    poisoned_allocations,
    threads,
)

DIFFERENTIABLE = [p for p in sample_params() if p.values[0].gradients]


def cotangents(result, dtype):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(t.shape, generator=g, dtype=torch.float64).bfloat16().to(dtype) for t in result]


def gradients(function, spec, args, kwargs, dtype):
    """Gradients of Σ ⟨output, cotangent⟩ with respect to every differentiable tensor; zeros where there is no path."""
    inputs = [t.requires_grad_() for t in gradient_tensors(spec, None, args, kwargs)]
    result = [t for t in flatten(function(*args, **kwargs)) if t.is_floating_point()]
    pairs = [(t, c) for t, c in zip(result, cotangents(result, torch.float64), strict=True) if t.requires_grad]
    clean = [(t, c.masked_fill(t.detach().isnan().cpu(), 0)) for t, c in pairs]
    with poisoned_allocations():
        return torch.autograd.grad([t for t, _ in clean], inputs, [c.to(t) for t, c in clean], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("spec", "backend", "device", "sample"), DIFFERENTIABLE)
def test_gradient_matches_truth(spec, backend, device, sample, dtype):
    if dtype not in sample.dtypes:
        pytest.skip(f"the sample {sample.note!r} is meant for other dtypes")
    rounded = cast((sample.args, dict(sample.kwargs)), dtype)
    truth = gradients(spec.reference, spec, *cast(rounded, torch.float64), torch.float64)
    coarse = gradients(spec.reference, spec, *cast(rounded, torch.float32), torch.float32)

    def public(*args, **kwargs):
        return spec.public(*args, **kwargs, backend=backend)

    actual = gradients(public, spec, *cast(rounded, dtype, device), dtype)
    with threads(1):
        again = gradients(public, spec, *cast(rounded, dtype, device), dtype)
    for i, (a, b, wanted, ref) in enumerate(zip(actual, again, truth, coarse, strict=True)):
        assert a.dtype == dtype
        bound = 4 * sample.bound(wanted, *cast(sample.args, torch.float64)) * float(wanted.abs().max()) if sample.bound else None
        if bound is not None and dtype in HALVES:
            bound += torch.finfo(dtype).eps * float(wanted.abs().max())
        assert_matches_truth(a, wanted, ref, dtype, gradient=True, bound=bound, what=f"gradient {i}")
        assert torch.equal(a, b), f"gradient {i}: other bits on a repeat with one thread"


@pytest.mark.parametrize(
    ("spec", "backend", "device", "sample"),
    [p for p in DIFFERENTIABLE if p.values[3].small and p.values[3].gradcheck and p.values[3].bound is None],
)
def test_gradcheck(spec, backend, device, sample):
    args, kwargs = cast((sample.args, dict(sample.kwargs)), torch.float64, device)
    inputs = [t.requires_grad_() for t in gradient_tensors(spec, sample, args, kwargs)]

    def function(*_):
        return [t.nan_to_num() for t in flatten(spec.public(*args, **kwargs, backend=backend)) if t.requires_grad]

    # fast_mode compares a random projection: a defect that one column of the full mode shows, it shows too
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, nondet_tol=0.0)


def subsets(count):
    """Which inputs want a gradient: every choice; of many inputs at most two, or all but one (a kernel has no more switches)."""
    for subset in itertools.product([False, True], repeat=count):
        if count <= 5 or sum(subset) <= 2 or sum(subset) >= count - 1:
            yield subset


@pytest.mark.parametrize(("spec", "backend", "device"), [p for p in backend_params() if p.values[0].gradients])
def test_every_subset_of_inputs(spec, backend, device):
    sample = spec.samples()[0]
    args, kwargs = cast((sample.args, dict(sample.kwargs)), torch.float64, device)
    count = len(gradient_tensors(spec, sample, args, kwargs))
    full = gradients(lambda *a, **k: spec.public(*a, **k, backend=backend), spec, args, kwargs, torch.float64)
    for subset in subsets(count):
        args, kwargs = cast((sample.args, dict(sample.kwargs)), torch.float64, device)
        inputs = gradient_tensors(spec, sample, args, kwargs)
        for t, wanted in zip(inputs, subset, strict=True):
            t.requires_grad_(wanted)
        result = [t for t in flatten(spec.public(*args, **kwargs, backend=backend)) if t.is_floating_point()]
        live = [
            (t, c.masked_fill(t.detach().isnan().cpu(), 0))
            for t, c in zip(result, cotangents(result, torch.float64), strict=True)
            if t.requires_grad
        ]
        assert bool(live) == any(subset)
        if live:
            torch.autograd.backward([t for t, _ in live], [c.to(t) for t, c in live])
        for t, wanted, reference in zip(inputs, subset, full, strict=True):
            assert (t.grad is not None) == wanted and (not wanted or torch.equal(t.grad, reference))


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in registry.specs() if s.refused])
def test_refused_gradients(spec):
    for name in spec.refused:
        sample = next(s for s in spec.samples() if flatten(arguments(spec.reference, s.args, dict(s.kwargs)).get(name)))
        args, kwargs = cast((sample.args, dict(sample.kwargs)), torch.float32)
        for t in flatten(arguments(spec.reference, args, kwargs)[name]):
            t.requires_grad_()
        with pytest.raises(NotImplementedError, match=f"{spec.name}: there is no gradient with respect to {name}"):
            spec.public(*args, **kwargs)
        with torch.no_grad():
            spec.public(*args, **kwargs)


@pytest.mark.parametrize(("spec", "backend", "device"), [p for p in backend_params() if p.values[0].gradients])
def test_second_derivative_is_refused(spec, backend, device):
    sample = spec.samples()[0]
    args, kwargs = cast((sample.args, dict(sample.kwargs)), torch.float64, device)
    inputs = [t.requires_grad_() for t in gradient_tensors(spec, sample, args, kwargs)]
    result = [t for t in flatten(spec.public(*args, **kwargs, backend=backend)) if t.requires_grad]
    first = torch.autograd.grad(result, inputs, [torch.ones_like(t).requires_grad_() for t in result], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in first if g.requires_grad).backward()
    # The gradient of a plain sum, as in a penalty: a constant where the operator is linear, else refused as well.
    first = torch.autograd.grad(
        [t.sum() for t in flatten(spec.public(*args, **kwargs, backend=backend)) if t.requires_grad], inputs, create_graph=True
    )
    truth = flatten(spec.reference(*args, **kwargs))
    curved = torch.autograd.grad([t.sum() for t in truth if t.requires_grad], inputs, create_graph=True)
    for g, wanted in zip(first, curved, strict=True):
        if wanted.requires_grad and any(
            t is not None and t.any() for t in torch.autograd.grad(wanted.square().sum(), inputs, allow_unused=True, retain_graph=True)
        ):
            with pytest.raises(RuntimeError, match="once_differentiable"):
                torch.autograd.grad(g.square().sum() + sum(t.square().sum() for t in inputs), inputs, retain_graph=True)

"""The same bits on every repeat and for any number of threads, at sizes where the threads really share the work."""

import pytest
import torch
from conftest import backend_params

from wsss_kernels.testing import cast, flatten, gradient_tensors, threads

CASES = [
    pytest.param(spec, backend, device, case, id=f"{spec.name}-{backend}-{case.name}")
    for spec, backend, device in (p.values for p in backend_params())
    if backend == "cpu" or device == "cuda"
    for case in spec.cases
    if case.quick
]


def bits(t):
    """The tensor as integers: NaN equals NaN of the same bits, and 0 is not −0."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]) if t.is_floating_point() else t


def test_the_comparison_sees_every_bit():
    nan, inf = float("nan"), float("inf")
    for dtype in (torch.float16, torch.float32, torch.float64):
        a = torch.tensor([nan, inf, 0.0], dtype=dtype)
        assert torch.equal(bits(a), bits(a.clone()))
        for other in ([0.0, inf, 0.0], [nan, torch.finfo(dtype).max, 0.0], [nan, inf, -0.0]):
            assert not torch.equal(bits(a), bits(torch.tensor(other, dtype=dtype)))


@pytest.mark.parametrize(("spec", "backend", "device", "case"), CASES)
def test_same_bits(spec, backend, device, case):
    def run():
        args, kwargs = cast(case.make(), torch.float32, device)
        inputs = [t.requires_grad_() for t in gradient_tensors(spec, None, args, kwargs)]
        result = flatten(spec.public(*args, **kwargs, backend=backend))
        live = [t for t in result if t.requires_grad]
        grads = (
            torch.autograd.grad(live, inputs, [torch.ones_like(t) for t in live], allow_unused=True, materialize_grads=True) if live else ()
        )
        return [bits(t.detach()) for t in (*result, *grads)]

    first = run()
    for count in (1, 2, 2):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"other bits with {count} threads"

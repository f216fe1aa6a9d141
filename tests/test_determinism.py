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
        return [t.detach().nan_to_num() if t.is_floating_point() else t for t in (*result, *grads)]

    first = run()
    for count in (1, 2, 2):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"other bits with {count} threads"

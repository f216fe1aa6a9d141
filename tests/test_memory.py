"""An operator allocates at most 1.1 times what its spec says, beyond inputs and outputs."""

import pytest
import torch
from conftest import backend_params

from wsss_kernels.testing import flatten, peak_memory


def cases():
    return [
        pytest.param(spec, backend, device, case, id=f"{spec.name}-{backend}-{case.name}")
        for spec, backend, device in (p.values for p in backend_params())
        if spec.peak_bytes is not None and (backend == "cpu" or device == "cuda")
        for case in spec.cases
        if case.quick
    ]


@pytest.mark.parametrize(("spec", "backend", "device", "case"), cases())
def test_peak(spec, backend, device, case):
    args, kwargs = case.make()
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with torch.no_grad():
        spec.public(*args, **kwargs, backend=backend)
        peak, result = peak_memory(lambda: spec.public(*args, **kwargs, backend=backend))
    outputs = sum(t.untyped_storage().nbytes() for t in flatten(result))
    allowed = 1.1 * spec.peak_bytes(*args, **kwargs) + 65536
    assert peak - outputs <= allowed, f"{peak - outputs} bytes beyond the result, {allowed:.0f} allowed"


def test_the_measure_sees_torch_and_workspaces():
    peak, _ = peak_memory(lambda: torch.empty(1 << 20).sum() + torch.empty(1 << 18).sum())
    assert 4 << 20 <= peak < 6 << 20

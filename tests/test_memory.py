"""An operator allocates at most 1.1 times what its spec says, beyond inputs and outputs; `par` keeps its promise to the byte."""

import pytest
import torch
from conftest import backend_params

import wsss_kernels as wk
from wsss_kernels.testing import flatten, map_tensors, peak_memory, runnable_backends


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
    args, kwargs = map_tensors(case.make(), lambda t: t.to(device))
    with torch.no_grad():
        spec.public(*args, **kwargs, backend=backend)
        peak, result = peak_memory(lambda: spec.public(*args, **kwargs, backend=backend))
    outputs = sum(t.untyped_storage().nbytes() for t in flatten(result))
    allowed = 1.1 * spec.peak_bytes(*args, **kwargs) + 65536
    assert peak - outputs <= allowed, f"{peak - outputs} bytes beyond the result, {allowed:.0f} allowed"


def par_has_a_cpu_kernel() -> bool:
    from wsss_kernels.ops.par.spec import SPECS

    return ("cpu", "cpu") in runnable_backends(SPECS[0])


@pytest.mark.skipif(not par_has_a_cpu_kernel(), reason="installed without compiled kernels")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("resized", [False, True], ids=["", "resized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("exact", "planes"), [(True, 110), (False, 60)])
@pytest.mark.parametrize("classes", [2, 6, 21])
@pytest.mark.parametrize("size", [(320, 320), (512, 512), (331, 257)], ids=str)
def test_par_in_float16_planes(size, classes, exact, planes, dtype, resized, backward):
    image = torch.rand(1, 3, *size, dtype=dtype)
    mask = torch.rand(1, classes, *(s // 4 if resized else s for s in size), dtype=dtype, requires_grad=backward)

    def refine():
        return wk.par(image, mask, num_iter=2, exact=exact, backend="cpu")

    peak, result = peak_memory(refine)
    outputs = result.untyped_storage().nbytes()
    if backward:
        cotangent = torch.ones_like(result)
        peak, (grad,) = peak_memory(lambda: torch.autograd.grad(result, mask, cotangent))
        outputs = grad.untyped_storage().nbytes()
    used = (peak - outputs) / (2 * size[0] * size[1])
    assert used <= planes, f"{used:.1f} float16 planes beyond the result"


def test_the_measure_sees_torch_and_workspaces():
    peak, _ = peak_memory(lambda: torch.empty(1 << 20).sum() + torch.empty(1 << 18).sum())
    assert 4 << 20 <= peak < 6 << 20

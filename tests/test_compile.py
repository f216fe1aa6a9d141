"""`torch.compile(fullgraph=True)` without a graph break or a recompile, and `opcheck` on every raw operator."""

import pytest
import torch
from conftest import backend_params

from wsss_kernels.testing import cast, flatten, gradient_tensors, map_tensors


def call(spec, dtype, device, sample=0):
    chosen = spec.samples()[sample]
    return cast((chosen.args, dict(chosen.kwargs)), dtype, device)


@pytest.mark.parametrize(("spec", "backend", "device"), backend_params())
def test_fullgraph(spec, backend, device):
    torch._dynamo.reset()

    def function(args, kwargs):
        return spec.public(*args, **kwargs, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            args, kwargs = call(spec, torch.float32, device)
            inputs = [t.requires_grad_() for t in gradient_tensors(spec, None, args, kwargs)]
            results = []
            for f in (compiled, function):
                result = flatten(f(args, kwargs))
                live = [t for t in result if t.requires_grad]
                grads = (
                    torch.autograd.grad(live, inputs, [torch.ones_like(t) for t in live], allow_unused=True, materialize_grads=True)
                    if live
                    else ()
                )
                results.append([*result, *grads])
            for a, b in zip(*results, strict=True):
                assert a.dtype == b.dtype and torch.equal(
                    a.nan_to_num() if a.is_floating_point() else a, b.nan_to_num() if b.is_floating_point() else b
                )


@pytest.mark.parametrize(("spec", "backend", "device"), backend_params())
def test_opcheck(spec, backend, device):
    """On the arguments that the public function really gives to each raw operator, forward and backward."""
    recorded = []

    def recorder(function):
        def record(*args):
            recorded.append((function, map_tensors(args, torch.clone)))
            return function(*args)

        return record

    kept = [dict(raw) for raw in spec.operator.raw]
    for raw in spec.operator.raw:
        raw[backend] = recorder(raw[backend])
    try:
        args, kwargs = call(spec, torch.float32, device)
        for t in gradient_tensors(spec, None, args, kwargs):
            t.requires_grad_()
        live = [t for t in flatten(spec.public(*args, **kwargs, backend=backend)) if t.requires_grad]
        if live:
            torch.autograd.backward(
                live, [torch.ones_like(t).movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else torch.ones_like(t) for t in live]
            )
    finally:
        for raw, original in zip(spec.operator.raw, kept, strict=True):
            raw.update(original)
    assert recorded or not spec.operator.raw
    for function, args in recorded:
        torch.library.opcheck(function, map_tensors(args, torch.detach))


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "backend", "device"), backend_params())
def test_inductor(spec, backend, device):
    torch._dynamo.reset()  # otherwise the operators of one process count as recompilations of the line below
    args, kwargs = call(spec, torch.float32, device)
    with torch.no_grad():
        plain = flatten(spec.public(*args, **kwargs, backend=backend))
        compiled = flatten(torch.compile(lambda a, k: spec.public(*a, **k, backend=backend), fullgraph=True)(args, kwargs))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)

"""`torch.compile(fullgraph=True)` without a graph break or a recompile, and `opcheck` on every raw operator."""

import pytest
import torch
from conftest import backend_params
from torch._dynamo.testing import CompileCounterWithBackend

import wsss_kernels as wk
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


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_that_change_from_call_to_call(dynamic):
    """An annealed temperature is a symbol after its second value; so is every number with `dynamic=True`. One tensor for several
    arguments: Dynamo does not take that from an `autograd.Function`."""
    x, y = torch.randn(2, 6, 4)
    label = torch.arange(6) % 2

    def function(x, y, number):
        maps = x.view(1, 2, 3, 4)
        losses = (
            wk.info_nce(x, y, number),
            wk.supervised_contrastive_loss(x, label, number),
            wk.uncertainty_info_nce(x, x, x, y, y, y, number, lam=number),
            wk.text_similarity(maps.movedim(-1, 1), y, number).sum(),
        )
        return sum(losses)

    def options(x, y, number):
        """Each value is compiled for."""
        maps = x.view(1, 2, 3, 4)
        attended = wk.window_attention(maps, maps, maps, num_heads=2, window_size=2, scale=number)
        _, centroid = wk.kmeans(x[None].detach(), 2, tol=number)
        return attended.sum() + wk.fuse_cams([maps], [number], (5, 3)).sum() + centroid.sum()

    for called, compilations in ((function, 2), (options, 4)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(called, fullgraph=True, dynamic=dynamic, backend=counter)
        for number in (0.1, 0.25, 0.5, 0.75):
            live = x.clone().requires_grad_(), x.clone().requires_grad_()
            losses = compiled(live[0], y, number), called(live[1], y, number)
            torch.testing.assert_close(*losses)
            gradients = [torch.autograd.grad(loss, t)[0] for loss, t in zip(losses, live, strict=True)]
            torch.testing.assert_close(*gradients)
        assert counter.frame_count <= compilations + 1  # Dynamo may count a graph again that it starts anew

"""Any strides in, the same values out: transposed, sliced, expanded, channels-last inputs; expanded gradients."""

import pytest
import torch
from conftest import backend_params

from wsss_kernels.testing import cast, flatten, gradient_tensors, map_tensors


def transposed(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 1 else t


def sliced(t):
    """A slice of a larger buffer of another alignment, whose other cells would show if they were read."""
    if t.dim() == 0:
        return t
    fill = float("nan") if t.is_floating_point() else 1
    larger = torch.full([n + 2 for n in t.shape], fill, dtype=t.dtype, device=t.device)
    view = larger[tuple(slice(1, 1 + n) for n in t.shape)]
    view.copy_(t)
    return view


def reversed_strides(t):
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def same(a, b):
    """Equal bits; on a GPU, where strides choose the kernel's tiles and with them the order of sums, equal to rounding."""
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    bound = 16 * torch.finfo(torch.float32).eps * float(b.abs().max()) if b.is_cuda and b.numel() else 0.0
    return bool(((a - b).abs() <= bound).all())


@pytest.mark.parametrize("layout", [transposed, sliced, reversed_strides, channels_last])
@pytest.mark.parametrize(("spec", "backend", "device"), backend_params())
def test_layout(spec, backend, device, layout):
    for sample in spec.samples()[:3]:
        call = cast((sample.args, dict(sample.kwargs)), torch.float32, device)
        if not sample.small and backend != "cpu":
            continue
        plain, laid = run(spec, backend, *call), run(spec, backend, *map_tensors(cast(call, torch.float32), layout))
        assert all(same(a, b) for a, b in zip(plain, laid, strict=True))


def run(spec, backend, args, kwargs):
    """Outputs and gradients."""
    inputs = [t.requires_grad_() for t in gradient_tensors(spec, None, args, kwargs)]
    result = flatten(spec.public(*args, **kwargs, backend=backend))
    live = [t for t in result if t.requires_grad]
    grads = torch.autograd.grad(live, inputs, [torch.ones_like(t) for t in live], allow_unused=True, materialize_grads=True) if live else ()
    return [t.detach().double() for t in (*result, *grads)]


@pytest.mark.parametrize(("spec", "backend", "device"), [p for p in backend_params() if p.values[0].gradients])
def test_expanded_gradient(spec, backend, device):
    """The gradient of `result.sum()` has stride 0 everywhere."""
    sample = spec.samples()[0]
    grads = []
    for expand in (False, True):
        args, kwargs = cast((sample.args, dict(sample.kwargs)), torch.float64, device)
        inputs = [t.requires_grad_() for t in gradient_tensors(spec, sample, args, kwargs)]
        live = [t for t in flatten(spec.public(*args, **kwargs, backend=backend)) if t.requires_grad]
        ones = [torch.ones((), dtype=t.dtype, device=t.device).expand(t.shape) if expand else torch.ones_like(t) for t in live]
        grads.append(torch.autograd.grad(live, inputs, ones, allow_unused=True, materialize_grads=True))
    assert all(same(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("spec", "backend", "device"), backend_params())
def test_expanded_input(spec, backend, device):
    """Every tensor with a leading dimension becomes one row, repeated with stride 0 (labels and probabilities stay valid)."""
    sample = spec.samples()[0]
    call = cast((sample.args, dict(sample.kwargs)), torch.float32, device)
    expanded = map_tensors(call, lambda t: t[:1].expand(t.shape) if t.dim() else t)
    dense = map_tensors(expanded, lambda t: t.contiguous())
    with torch.no_grad():
        a = flatten(spec.public(*expanded[0], **expanded[1], backend=backend))
        b = flatten(spec.public(*dense[0], **dense[1], backend=backend))
    assert all(same(x, y) for x, y in zip(a, b, strict=True))

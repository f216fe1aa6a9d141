"""What the shared matrix cannot hold: bits of the eager code, extrema that several pixels share, NaN and infinity."""

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.testing import runnable_backends

BACKENDS = [*runnable_backends(registry.spec("normalize_cam")), ("reference", "cpu")]


def eager(cam: torch.Tensor) -> torch.Tensor:
    cam = cam.relu()
    low, high = cam.amin((-2, -1), keepdim=True), cam.amax((-2, -1), keepdim=True)
    return (cam - low) / (high - low).clamp_min(1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_bits_of_the_eager_code(backend, device, dtype):
    for size in ((3, 1, 1), (2, 3, 28, 28), (5, 17, 19), (200, 201)):
        for offset in (0.0, 5.0):
            cam = torch.randn(size, dtype=dtype) + offset
            assert torch.equal(wk.normalize_cam(cam.to(device), backend=backend).cpu(), eager(cam))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_gradient_agrees_with_the_eager_code_where_extrema_are_unique(backend, device):
    cam, grad = torch.rand(4, 9, 70, dtype=torch.float64) + 0.1, torch.randn(4, 9, 70, dtype=torch.float64)
    gradients = []
    for function in (lambda x: wk.normalize_cam(x.to(device), backend=backend).cpu(), eager):
        x = cam.clone().requires_grad_()
        gradients += torch.autograd.grad(function(x), x, grad)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_the_first_of_equal_extrema_gets_the_gradient(backend, device):
    cam = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 1.0]], dtype=torch.float64, device=device, requires_grad=True)
    result = wk.normalize_cam(cam, backend=backend)
    (gradient,) = torch.autograd.grad(result, cam, torch.tensor([[0, 0, 1.0], [0, 0, 0]], dtype=torch.float64, device=device))
    # y = (2 − low) / (high − low) with low = 1 and high = 3
    assert gradient.cpu().tolist() == [[-0.25, -0.25, 0.5], [0, 0, 0]]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_constant_maps_give_zeros_and_no_gradient(backend, device):
    cam = torch.stack([torch.full((5, 70), value) for value in (0.0, -1.0, 0.3, 1e30)]).to(device).requires_grad_()
    result = wk.normalize_cam(cam, backend=backend)
    (gradient,) = torch.autograd.grad(result, cam, torch.randn(4, 5, 70, device=device))
    assert not result.any() and not gradient.any()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nan_and_infinity_stay_in_their_maps(backend, device):
    cam = torch.rand(4, 6, 50)
    cam[1, 5, 49] = cam[2, 0, 0] = torch.nan
    cam[3, 2, 3] = torch.inf
    result = wk.normalize_cam(cam.to(device), backend=backend).cpu()
    assert torch.equal(result[0], eager(cam[0])) and bool(result[1:3].isnan().all())
    assert result[3].isnan().sum() == 1 and result[3].nan_to_num().sum() == 0

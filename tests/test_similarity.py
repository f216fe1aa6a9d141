"""What the shared matrix cannot hold: which pixel the gradient of the maximum reaches, and NaN."""

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.testing import runnable_backends

BACKENDS = [*runnable_backends(registry.spec("text_similarity_pool")), ("reference", "cpu")]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_gradient_of_the_maximum_reaches_the_first(backend, device):
    visual = torch.randn(1, 4, 9, 11, dtype=torch.float64).repeat(1, 1, 2, 1).to(device).requires_grad_()
    wk.text_similarity_pool(visual, torch.randn(2, 4, dtype=torch.float64).to(device), backend=backend).sum().backward()
    touched = visual.grad.abs().sum(1)[0].nonzero()
    assert 1 <= len(touched) <= 2 and bool((touched[:, 0] < 9).all())


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("pixel", [0, 5, 63, 64, 98])
def test_nan_is_the_maximum_of_its_image_only(backend, device, pixel):
    visual, text = torch.randn(2, 4, 9, 11), torch.randn(3, 4)
    visual.view(2, 4, -1)[0, 2, pixel] = torch.nan
    result = wk.text_similarity_pool(visual.to(device), text.to(device), backend=backend)
    assert bool(result[0].isnan().all()) and not bool(result[1].isnan().any())


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-21, 1e19, 1e30])
@pytest.mark.parametrize("operator", [wk.text_similarity, wk.text_similarity_pool])
def test_vectors_whose_squares_float32_cannot_hold(operator, size, backend, device):
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(1, 40, 3, 5, generator=generator).clamp(0.5, 2)
    text = torch.randn(2, 40, generator=generator)
    live = [(size * visual).to(device).requires_grad_(), visual.clone().double().requires_grad_()]
    values = [operator(live[0], text.to(device), backend=backend), operator(live[1], text.double(), backend="reference")]
    torch.testing.assert_close(values[0].double().cpu(), values[1], rtol=1e-5, atol=1e-6)
    if size > 1e-35:  # a gradient of 1e38 and more is beyond float32
        for value in values:
            value.sum().backward()
        torch.testing.assert_close(live[0].grad.double().cpu() * size, live[1].grad, rtol=1e-4, atol=1e-5)

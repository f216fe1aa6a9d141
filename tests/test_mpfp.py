"""What the shared matrix cannot hold: the released implementation's outputs, and the module."""

import pytest
import torch
from conftest import golden, load

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.testing import runnable_backends


@pytest.mark.parametrize("file", golden("mpfp_*.npz"))
@pytest.mark.parametrize(("backend", "device"), [*runnable_backends(registry.spec("mpfp")), ("reference", "cpu")])
def test_golden(file, backend, device):
    data = load(file)
    weights = [torch.stack([data[f"weight_{sign}_{i}"] for i in range(3)]).to(device) for sign in ("pos", "neg")]
    logit, fused = wk.mpfp(data["feature"].to(device), *weights, backend=backend)
    for result, wanted in ((logit, data["logit"]), (fused, data["fused"])):
        torch.testing.assert_close(result.cpu(), wanted, rtol=0, atol=1e-8 * float(wanted.abs().max()))


def test_module():
    module = wk.MPFP(3, scales=(2, 5))
    feature = torch.randn(2, 3, 7, 9)
    logit, fused = module(feature)
    assert logit.shape == (2, 3) and fused.shape == feature.shape
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {"weight_pos": (1, 2, 6, 3, 3), "weight_neg": (1, 2, 6, 3, 3)}
    torch.autograd.backward([logit, fused], [torch.ones_like(logit), torch.ones_like(fused)])
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())
    bound = (6 * 9) ** -0.5
    assert bool((module.weight_pos.abs() <= bound).all()) and float(module.weight_pos.detach().std()) > 0.4 * bound


@pytest.mark.parametrize(("backend", "device"), [*runnable_backends(registry.spec("mpfp")), ("reference", "cpu")])
@pytest.mark.parametrize("where", range(3))
def test_nan_is_not_hidden(where, backend, device):
    tensors = [torch.randn(1, 2, 9, 7).to(device), *torch.randn(2, 3, 2, 4, 3, 3).to(device)]
    tensors[where].view(-1)[tensors[where].numel() // 2] = torch.nan
    logit, fused = wk.mpfp(*tensors, backend=backend)
    assert bool(logit.isnan().any()) and bool(fused.isnan().any())

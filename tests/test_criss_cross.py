"""What the shared matrix cannot hold: CCNet's outputs and its module."""

import pytest
import torch
from conftest import golden, load

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.testing import assert_matches_truth, runnable_backends


@pytest.mark.parametrize("file", golden("crisscross_*.npz"))
@pytest.mark.parametrize(("backend", "device"), [*runnable_backends(registry.spec("criss_cross_attention")), ("reference", "cpu")])
def test_golden(file, backend, device):
    data = load(file)
    result = wk.criss_cross_attention(*(data[name].to(device) for name in ("query", "key", "value")), backend=backend)
    torch.testing.assert_close(result.cpu(), data["out"], rtol=0, atol=1e-8 * float(data["out"].abs().max()))


def test_module():
    module, x = wk.CrissCrossAttention(16), torch.randn(2, 16, 5, 7)
    assert torch.equal(module(x), x)  # gamma starts at 0
    shapes = {"gamma": (1,)}
    for name, channels in (("query_conv", 2), ("key_conv", 2), ("value_conv", 16)):
        shapes |= {f"{name}.weight": (channels, 16, 1, 1), f"{name}.bias": (channels,)}
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == shapes
    with torch.no_grad():
        module.gamma.fill_(0.5)
    attention = wk.criss_cross_attention(module.query_conv(x), module.key_conv(x), module.value_conv(x))
    torch.testing.assert_close(module(x), 0.5 * attention + x)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(ValueError, match="CrissCrossAttention: in_dim must be at least 8, got 4"):
        wk.CrissCrossAttention(4)


@pytest.mark.parametrize(("backend", "device"), runnable_backends(registry.spec("criss_cross_attention")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [30, 100])
def test_gradients_of_peaked_weights(size, dtype, backend, device):
    """Nothing scales the logits: where one weight is nearly 1, its logit's gradient is a small difference."""
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, channels, 4, 5, generator=generator).to(dtype) for channels in (2, 2, 6, 6)]
    maps[0] = maps[0] * size

    def gradients(kind, where, place):
        live = [t.to(place, kind).requires_grad_() for t in maps[:3]]
        return torch.autograd.grad(wk.criss_cross_attention(*live, backend=where), live, maps[3].to(place, kind))

    truth, coarse = gradients(torch.float64, "reference", "cpu"), gradients(torch.float32, "reference", "cpu")
    for actual, wanted, ref in zip(gradients(dtype, backend, device), truth, coarse, strict=True):
        assert_matches_truth(actual, wanted, ref, dtype, gradient=True)

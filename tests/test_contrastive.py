"""The contrastive losses: golden vectors, and what the shared matrix cannot hold."""

import pytest
import torch
from conftest import golden, load

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.testing import peak_memory, runnable_backends


def backends(name):
    return [*runnable_backends(registry.spec(name)), ("reference", "cpu")]


@pytest.mark.parametrize("file", golden("supcon_*.npz"))
@pytest.mark.parametrize(("backend", "device"), backends("supervised_contrastive_loss"))
def test_released_outputs(file, backend, device):
    data = load(file)
    z, label = data["z"].to(device), data["label"].to(device)
    for reduction in ("sum", "mean"):
        result = wk.supervised_contrastive_loss(z, label, data["tau"], reduction=reduction, backend=backend)
        assert float(result) == pytest.approx(data[f"loss_{reduction}"], rel=1e-8)


@pytest.mark.parametrize("name", ["supervised_contrastive_loss", "info_nce"])
def test_backward_stays_streaming(name):
    """Forward and backward of 4096 embeddings in a quarter of what one matrix of pairs would take."""
    z, label = torch.randn(4096, 16, requires_grad=True), torch.randint(2, (4096,))
    other = torch.randn(4096, 16, requires_grad=True)

    def both():
        loss = wk.supervised_contrastive_loss(z, label) if name.startswith("sup") else wk.info_nce(z, other, 0.1)
        return torch.autograd.grad(loss, [t for t in (z, other) if name == "info_nce" or t is z])

    both()
    backend = wk.explain("info_nce", z, other, 0.1).chosen
    if backend == "reference":
        pytest.skip("the reference stores the matrix of pairs")
    assert peak_memory(both)[0] < 4096 * 4096 * 4 / 4


def test_autocast_leaves_the_temperature_alone():
    x, y, tau = torch.randn(9, 4), torch.randn(9, 4), torch.tensor(0.07, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = wk.info_nce(x, y, tau)
    expected = wk.info_nce(x.bfloat16(), y.bfloat16(), 0.07)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, tau)
    assert gradient.dtype == torch.float32 and gradient != 0


def test_far_apart_embeddings_do_not_underflow():
    """With 1/temperature = 250 every exponential but the largest vanishes in float32 under a fixed shift."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [0.0, 1.0], [0.1, -1.0]])
    label = torch.tensor([0, 0, 1, 1])
    for function in (
        lambda z, backend: wk.supervised_contrastive_loss(z, label, 0.004, backend=backend),
        lambda z, backend: wk.info_nce(z, -z, 0.004, backend=backend),
    ):
        truth = function(z.double(), "reference")
        torch.testing.assert_close(function(z, None), truth.float())


@pytest.mark.parametrize(("backend", "device"), backends("supervised_contrastive_loss"))
def test_a_label_of_one_byte_does_not_wrap_around(backend, device):
    """The default ignore_index, −1, is not 255."""
    z, label = torch.randn(6, 5).to(device), torch.tensor([255, 255, 255, 1, 1, 2], device=device)
    one_byte = wk.supervised_contrastive_loss(z, label.byte(), backend=backend)
    assert torch.equal(one_byte, wk.supervised_contrastive_loss(z, label, backend=backend))


@pytest.mark.parametrize(("backend", "device"), backends("info_nce"))
@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e-30, 1e30, 1e160, 1e300])
def test_rows_whose_squares_leave_the_range(size, backend, device):
    dtype = torch.float32 if 1e-37 < size < 1e37 else torch.float64
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, 5, generator=generator, dtype=dtype).to(device)
    label = torch.arange(7, device=device) % 3
    for function in (
        lambda x: wk.info_nce(x, y, 0.1, backend=backend),
        lambda x: wk.supervised_contrastive_loss(x, label, backend=backend),
    ):
        given, usual = (x * size).requires_grad_(), x.clone().requires_grad_()
        losses = function(given), function(usual)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        gradients = [torch.autograd.grad(loss, t)[0] for loss, t in zip(losses, (given, usual), strict=True)]
        torch.testing.assert_close(gradients[0] * size, gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), backends("info_nce"))
def test_nan_is_not_hidden(backend, device):
    x, y = torch.randn(2, 7, 5).to(device)
    x[3, 2] = torch.nan
    label = torch.arange(7, device=device) % 3
    losses = (
        wk.info_nce(x, y, 0.1, backend=backend),
        wk.supervised_contrastive_loss(x, label, backend=backend),
        wk.uncertainty_info_nce(x, y, y, y, x[:1].expand(7, 5), y, 0.1, backend=backend),
    )
    assert all(bool(loss.isnan()) for loss in losses)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(("backend", "device"), [b for b in runnable_backends(registry.spec("info_nce")) if b[0] == "triton"])
def test_strips_of_rows_add_up(backend, device, labels, monkeypatch):
    """Strips of 128 rows, the last of 44, give what one strip does, to the rounding of float64."""
    from wsss_kernels.ops.contrastive import triton_impl

    x, y = (torch.randn(300, 33, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    tau = torch.tensor(0.07, dtype=torch.float64, device=device, requires_grad=True)
    label = torch.randint(5, (300,), device=device) if labels else None

    def both():
        loss = wk.info_nce(x, y, tau, label=label, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (x, y, tau))

    whole = both()
    monkeypatch.setattr(triton_impl, "STRIP_BYTES", 1)
    for part, expected in zip(both(), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-14)

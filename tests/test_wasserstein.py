"""Wasserstein distance, similarity and loss: golden vectors, and what the shared matrix cannot hold."""

import pytest
import torch
from conftest import golden, load

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.testing import peak_memory, runnable_backends


def backends(name):
    return [*runnable_backends(registry.spec(name)), ("reference", "cpu")]


def six(data, device):
    return [data[name].to(device) for name in ("sem_x", "mu_x", "sigma_x", "sem_y", "mu_y", "sigma_y")]


@pytest.mark.parametrize("file", golden("wasserstein_*.npz"))
@pytest.mark.parametrize(("backend", "device"), backends("wasserstein2"))
def test_released_outputs(file, backend, device):
    data = load(file)
    args, constants = six(data, device), {name: data[name] for name in ("a", "b", "lam")}
    distance = wk.wasserstein2(args[1], args[2], args[4], args[5], backend=backend)
    torch.testing.assert_close(distance.cpu(), data["w2"], rtol=0, atol=1e-8 * float(data["w2"].max()))
    similarity = wk.uncertainty_similarity(*args, **constants, backend=backend)
    torch.testing.assert_close(similarity.cpu(), data["similarity"], rtol=0, atol=1e-8)
    if "infonce_xy" in data:
        loss = wk.uncertainty_info_nce(*args, data["tau"], **constants, backend=backend)
        assert float(loss) == pytest.approx((data["infonce_xy"] + data["infonce_yx"]) / 2, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_gaussians_are_exactly_zero_apart(dtype):
    mu, sigma = torch.randn(40, 700, dtype=dtype) + 3, torch.rand(40, 700, dtype=dtype)
    if wk.explain("wasserstein2", mu, sigma, mu, sigma).chosen == "reference":
        pytest.skip("the reference rounds the norms and the product differently")
    assert bool((wk.wasserstein2(mu, sigma, mu, sigma).diagonal() == 0).all())


def test_semantic_rows_that_agree_have_no_gradient_through_the_clamp():
    sem = torch.eye(4, dtype=torch.float64).requires_grad_()
    mu, sigma = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    similarity = wk.uncertainty_similarity(sem, mu, sigma, sem.detach().clone(), mu, sigma)
    (gradient,) = torch.autograd.grad(similarity.diagonal().sum(), sem)
    assert bool((gradient == 0).all())


def test_learnt_temperature_may_be_float32_under_autocast():
    args, tau = [torch.rand(5, 4) for _ in range(6)], torch.tensor(0.07, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = wk.uncertainty_info_nce(*args, tau)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, tau)[0].dtype == torch.float32


def test_backward_stays_streaming():
    """Where a matrix of pairs is larger than the inputs, forward and backward take a fraction of it."""
    args = [torch.randn(4096, 16, requires_grad=True) for _ in range(6)]
    if wk.explain("uncertainty_info_nce", *args, 0.07).chosen == "reference":
        pytest.skip("the reference stores the matrix of pairs")
    peak, _ = peak_memory(lambda: torch.autograd.grad(wk.uncertainty_info_nce(*args, 0.07), args))
    assert peak < 4096 * 4096 * 4 / 2


@pytest.mark.parametrize(("backend", "device"), [b for b in backends("uncertainty_info_nce") if b[0] == "triton"])
def test_strips_of_the_products_are_as_good_as_all_of_them(backend, device, monkeypatch):
    """Real strips hold 16 MiB: only sizes that take minutes in the interpreter have several."""
    from wsss_kernels.ops.wasserstein import triton_impl

    monkeypatch.setattr(triton_impl, "STRIP_BYTES", 0)
    given = [torch.randn(300, 3 + (i % 3 == 0), dtype=torch.float64, device=device, requires_grad=True) for i in range(6)]
    some = [*given[:3], *(t[:70] for t in given[3:])]
    found = []
    for chosen in (backend, "reference"):
        loss = wk.uncertainty_info_nce(*given, 0.25, backend=chosen)
        similarity = wk.uncertainty_similarity(*some, backend=chosen)
        found.append([loss, similarity, *torch.autograd.grad(loss + similarity.square().mean(), given)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("backend", "device"), [b for b in backends("wasserstein2") if b[0] != "reference"])
def test_near_gaussians_keep_their_distance(backend, device):
    """|x|² + |y|² − 2 x·y of rows a thousandth apart would be rounding errors alone, below them where rows repeat, on any library."""
    mu, sigma = torch.randn(40, 90, device=device), torch.rand(40, 90, device=device)
    mu, sigma = mu[torch.arange(80) % 40], sigma[torch.arange(80) % 40]
    found = wk.wasserstein2(mu, sigma, mu, sigma, backend=backend)
    assert bool((found[:40, 40:].diagonal() == 0).all()) and bool((found.diagonal() == 0).all())
    if backend == "triton":
        near = mu + 1e-3 * torch.randn_like(mu)
        truth = wk.wasserstein2(mu.double(), sigma.double(), near.double(), sigma.double(), backend="reference").float().diagonal()
        torch.testing.assert_close(wk.wasserstein2(mu, sigma, near, sigma, backend=backend).diagonal(), truth, rtol=2e-3, atol=0)

"""What the shared matrix cannot hold: the weights are constants, and labels that are no class."""

import pytest
import torch

import wsss_kernels as wk
from benchmarks.baselines.purified_label import eager
from wsss_kernels import registry
from wsss_kernels.testing import runnable_backends


@pytest.mark.parametrize("classes", [2, 5])
def test_gradient_is_that_of_the_eager_code(classes):
    logit = torch.randn(3, classes, 9, 11, dtype=torch.float64, requires_grad=True)
    label = torch.randint(classes, (3, 9, 11)).masked_fill(torch.rand(3, 9, 11) < 0.3, 255)
    ours, theirs = wk.purified_label_loss(logit, label), eager(logit, label)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours, logit), torch.autograd.grad(theirs, logit), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("bad", [-1, 3, 256, 2**40])
def test_a_label_that_is_no_class(bad):
    label = torch.zeros(1, 5, 7, dtype=torch.int64)
    label[0, 3, 4] = bad
    with pytest.raises(RuntimeError, match="label must hold classes 0 to 2 or ignore_index 255"):
        wk.purified_label_loss(torch.rand(1, 3, 5, 7), label, backend="cpu")


@pytest.mark.parametrize(
    ("backend", "device"), [pair for pair in runnable_backends(registry.spec("purified_label_loss")) if pair[0] == "cuda"]
)
def test_a_label_that_is_no_class_is_seen_in_the_loss(backend, device):
    for bad in (-1, 3, 2**40):
        label = torch.zeros(2, 5, 7, dtype=torch.int64)
        label[1, 3, 4] = bad
        loss = wk.purified_label_loss(torch.rand(2, 3, 5, 7).to(device), label.to(device), backend=backend)
        assert bool(loss.isnan())


@pytest.mark.parametrize(("backend", "device"), runnable_backends(registry.spec("purified_label_loss")))
def test_several_tiles(backend, device):
    """More pixels than one block takes, in two images of which one has a single class."""
    logit = torch.randn(2, 2, 67, 71, dtype=torch.float64)
    label = torch.randint(2, (2, 67, 71)).masked_fill(torch.rand(2, 67, 71) < 0.3, 255)
    label[1] = torch.where(label[1] == 255, 255, 1)
    given = [logit.clone().to(device).requires_grad_(), logit.clone().requires_grad_()]
    ours = wk.purified_label_loss(given[0], label.to(device), backend=backend)
    theirs = wk.purified_label_loss(given[1], label, backend="reference")
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=0)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(given[0].grad.cpu(), given[1].grad, rtol=1e-10, atol=1e-15)


def test_an_ignore_index_beyond_int64():
    with pytest.raises(ValueError, match="ignore_index must be less than"):
        wk.purified_label_loss(torch.rand(1, 3, 5, 7), torch.zeros(1, 5, 7, dtype=torch.int64), ignore_index=2**70)

"""What the shared matrix cannot hold: the weights are constants, and labels that are no class."""

import pytest
import torch

import wsss_kernels as wk
from benchmarks.baselines.purified_label import eager


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

"""The share of the operators in a training step."""

import pytest
import torch

import wsss_kernels
from benchmarks.operator_share import share_of_operators
from wsss_kernels.ops.contrastive import reference


def _step(operator: bool, other: int):
    z = torch.randn(512, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label, m = torch.arange(512) % 5, torch.randn(other, other).requires_grad_()

    def step():
        loss = (m @ m).sum()
        if operator:
            loss = loss + wsss_kernels.supervised_contrastive_loss(z, label, 0.1)
        loss.backward()

    step()
    return step


def _shares(step):
    return [share_of_operators(step) for _ in range(5)]


@pytest.mark.parametrize(("backend", "least"), [("reference", 0.85), (None, 0.5)])
def test_the_share_of_a_backend_forward_and_backward(backend, least):
    with wsss_kernels.use_backend(backend):
        assert share_of_operators(_step(False, 300)) == 0
        # several times: other processes interrupt a step of a millisecond
        assert min(_shares(_step(True, 1000))) < 0.9
        assert max(_shares(_step(True, 8))) > least  # the reference's forward alone is below


def test_the_reference_is_as_before_when_the_share_is_measured():
    before = reference.supervised_contrastive_loss

    def fail():
        assert reference.supervised_contrastive_loss is not before
        raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        share_of_operators(fail)
    assert reference.supervised_contrastive_loss is before

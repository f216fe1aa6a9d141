"""Streaming operators at N = 16384, where a matrix of pairs is 1 GiB: what the process itself grows by, whoever allocates."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wsss_kernels as wk

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MIB = 200  # beyond inputs and their gradients

CHILD = """
import sys
import torch
import wsss_kernels as wk

def mib(field):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(field + ":")).split()[1]) / 1024

def call(name, n):
    def random(count, *size):
        return [torch.randn(*size, requires_grad=True) for _ in range(count)]

    if name == "uncertainty_info_nce":
        inputs = random(6, n, 128)
        return inputs, lambda: wk.uncertainty_info_nce(*inputs, 0.07)
    if name == "info_nce":
        inputs = random(2, n, 128)
        return inputs, lambda: wk.info_nce(*inputs, 0.07)
    if name == "affinity_loss":
        inputs, label = random(1, 1, 32, n // 128, 128), torch.randint(3, (1, n // 128, 128))
        return inputs, lambda: wk.affinity_loss(*inputs, label)
    if name == "supervised_contrastive_loss":
        inputs, label = random(1, n, 16), torch.randint(2, (n,))
        return inputs, lambda: wk.supervised_contrastive_loss(*inputs, label)
    inputs = random(1, 1)
    return inputs, lambda: inputs[0].sum() + torch.ones(n, n)[0, 0]

name, size = sys.argv[1], int(sys.argv[2])
inputs, function = call(name, 128)
function().backward()  # threads and libraries
inputs, function = call(name, size)
before = mib("VmRSS")
function().backward()
assert all(t.grad is not None for t in inputs)
print(mib("VmHWM") - before - sum(t.numel() * 4 for t in inputs) / 2**20)
"""


def growth(name: str, size: int) -> float:
    """MiB by which a process grows during forward and backward pass, beyond the gradients."""
    done = subprocess.run([sys.executable, "-c", CHILD, name, str(size)], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "name",
    [
        "affinity_loss",
        "supervised_contrastive_loss",
        "info_nce",
        pytest.param("uncertainty_info_nce", marks=pytest.mark.slow),  # 8·10^11 operations
    ],
)
def test_pairs_are_never_stored(name):
    x = torch.rand(1, 1, 1, 1)
    if wk.explain("affinity_loss", x, x[0].long()).chosen == "reference":
        pytest.skip("the references store the matrix of pairs")
    assert growth(name, 16384) <= LIMIT_MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_measure_sees_a_matrix():
    assert 255 <= growth("matrix of pairs", 8192) < 320

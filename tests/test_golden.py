"""Outputs of the released implementations in float64, to 1e-8 relative (a few of their constants are float32)."""

import pytest
import torch
from conftest import golden, load

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.testing import runnable_backends


def backends(name):
    return [*runnable_backends(registry.spec(name)), ("reference", "cpu")]


@pytest.mark.parametrize("file", golden("par_*.npz"))
@pytest.mark.parametrize(("backend", "device"), backends("par"))
def test_par(file, backend, device):
    data = load(file)
    if backend == "cuda" and device == "cpu" and data["par"].numel() > 20000:
        pytest.skip("too large for the CUDA emulator; the smaller vectors run there")
    image, mask = data["image"].double().to(device), data["mask"].double().to(device)
    for variant in ("par", "pamr"):
        result = wk.par(image, mask, data["dilations"].tolist(), int(data["num_iter"]), variant=variant, backend=backend)
        torch.testing.assert_close(result.cpu(), data[variant], rtol=0, atol=1e-8 * float(data[variant].abs().max()))


@pytest.mark.parametrize("file", golden("boxmask_*.npz"))
@pytest.mark.parametrize(("backend", "device"), backends("box_mask"))
def test_box_mask(file, backend, device):
    data = load(file)
    result = wk.box_mask(data["cam"].to(device), data["threshold"], clip_border=True, backend=backend)
    assert torch.equal(result.cpu(), data["mask"])

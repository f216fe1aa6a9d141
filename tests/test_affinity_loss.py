"""The affinity loss: golden vectors, and what the shared matrix cannot hold."""

import functools
import importlib

import pytest
import torch
from conftest import golden, load

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.testing import peak_memory, runnable_backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [*runnable_backends(registry.spec("affinity_loss")), ("reference", "cpu")]


@pytest.mark.parametrize("file", golden("affloss_*.npz"))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_released_outputs(file, backend, device):
    data = load(file)
    cells = data["label"].numel()
    for height in (1, 4, 20):
        feature = data["feature"].reshape(1, -1, height, cells // height).to(device)
        label = data["label"].reshape(1, height, cells // height).to(device)
        for kind in ("balanced", "bce"):
            loss = wk.affinity_loss(feature, label, kind=kind, ignore_index=data["ignore_index"], backend=backend)
            assert float(loss) == pytest.approx(data[f"loss_{kind}"], rel=1e-8)


def test_memory_grows_with_the_cells_and_not_with_the_pairs():
    peaks = []
    for side in (64, 128):
        feature, label = torch.randn(1, 8, side, side, device=DEVICE, requires_grad=True), torch.randint(3, (1, side, side), device=DEVICE)
        if wk.explain("affinity_loss", feature, label).chosen == "reference":
            pytest.skip("the reference stores the matrix of pairs")
        backend = None if feature.is_cuda else "cpu"  # Triton's interpreter would need a quarter of an hour
        loss = functools.partial(wk.affinity_loss, feature, label, backend=backend)
        peaks.append(peak_memory(lambda: torch.autograd.grad(loss(), feature))[0])  # noqa: B023 (called at once)
    assert peaks[1] < 4.5 * peaks[0], f"four times the cells, {peaks[1] / peaks[0]:.1f} times the memory"
    assert peaks[1] < 16384 * 16384 * 4 / 16


def test_nan_is_not_hidden():
    feature, label = torch.randn(1, 3, 4, 5), torch.zeros(1, 4, 5, dtype=torch.int64)
    feature[0, 0, 1, 1] = float("nan")
    assert all(bool(wk.affinity_loss(feature, label, kind=kind).isnan()) for kind in ("balanced", "bce"))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_label_of_one_byte_does_not_wrap_around(backend, device):
    """300 is no label of one byte: nothing is ignored, also not 300 − 256 = 44."""
    feature, label = torch.randn(1, 4, 2, 3).to(device), torch.tensor([[[0, 44, 0], [44, 1, 1]]], device=device)
    one_byte = wk.affinity_loss(feature, label.byte(), ignore_index=300, backend=backend)
    assert torch.equal(one_byte, wk.affinity_loss(feature, label, backend=backend))


@pytest.mark.parametrize("options", [{}, {"radius": 2, "kind": "bce"}], ids=str)
@pytest.mark.parametrize(("backend", "device"), [b for b in BACKENDS if b[0] == "triton"])
def test_strips_add_up(backend, device, options, monkeypatch):
    """Strips of 128 rows of an image, or of one image each, give what one strip of everything does, to the rounding of float64."""
    strips = importlib.import_module("wsss_kernels.ops.affinity_loss.triton_impl")
    feature = torch.randn(2, 5, 20, 15, dtype=torch.float64, device=device, requires_grad=True)
    label = torch.randint(3, (2, 20, 15), device=device)

    def both():
        loss = wk.affinity_loss(feature, label, **options, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, feature)

    whole = both()
    for size in (1, 8 * 300 * 300):
        monkeypatch.setattr(strips, "STRIP_BYTES", size)
        for part, expected in zip(both(), whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-14)

"""Gradients of the refining map by strips of rows: no sample is large enough to need several strips."""

from __future__ import annotations

import pytest
import torch

from wsss_kernels import _native, refining_map
from wsss_kernels.ops.affinity.spec import scaled, spread_features, spread_maps

pytestmark = pytest.mark.skipif(not _native.INTERPRETED, reason="Triton's interpreter is off")


def gradients(backend: str, decoder: torch.Tensor | None, encoder: torch.Tensor, first: int, **options) -> tuple[torch.Tensor, ...]:
    inputs = [t.clone().requires_grad_() for t in (decoder, encoder) if t is not None]
    result = refining_map(*(inputs if decoder is not None else (None, *inputs)), first_layer=first, backend=backend, **options)
    n = encoder.shape[-1]
    loss = (result.matrix * torch.linspace(-1, 2, n * n, dtype=torch.float64).view(n, n)).sum()
    if decoder is not None:
        loss = loss + (result.deviation[:, first:] * torch.linspace(-0.5, 0.25, encoder.shape[1] - first)).sum()
    with torch.autocast("cpu"):  # must not reach the products
        return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize("with_decoder", [True, False])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("maps", [False, True])
def test_strips(monkeypatch, maps, first, with_decoder, size):
    """Several strips of an image, and several images in a strip."""
    from wsss_kernels.ops.affinity import triton_adjoint

    monkeypatch.setattr(triton_adjoint, "STRIP_BYTES", size)
    monkeypatch.setattr(triton_adjoint, "LEAST_ROWS", 32)
    n = 71
    encoder = spread_maps(3, n) if maps else spread_features(3, 6, n)
    given = scaled(2, 5, n) if with_decoder else None, encoder, first
    options = {"encoder_is": "affinity" if maps else "feature"}
    for found, expected in zip(gradients("triton", *given, **options), gradients("reference", *given, **options), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("batch", "n", "layers"), [(1, 784, 6), (4, 196, 6), (2, 4096, 6), (3, 130, 1), (0, 5, 1), (1, 20000, 12)])
def test_strips_cover_every_row_once(batch, n, layers):
    from wsss_kernels.ops.affinity.triton_adjoint import LEAST_ROWS, STRIP_BYTES, strips

    seen = torch.zeros(batch, n)
    for strip in strips(batch, n, layers, torch.float32):
        seen[strip.start : strip.start + strip.images, strip.begin : strip.begin + strip.rows] += 1
        assert strip.rows <= LEAST_ROWS or strip.images * strip.rows * layers * n * 4 <= 1.25 * STRIP_BYTES
    assert seen.eq(1).all()

"""Which backend runs: argument, context, environment, automatic; reasons; overhead."""

import os
import subprocess
import sys
import time

import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import _native
from wsss_kernels._dispatch import BACKENDS, OPERATORS
from wsss_kernels.ops.par import api

IMAGE, MASK = torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)


def test_explain_names_every_backend_and_reason():
    text = wk.explain("par", IMAGE, MASK)
    assert set(text.reasons) == set(BACKENDS) and text.reasons["reference"] is None
    assert "par has no triton implementation" in str(text) or "CUDA tensors" in str(text)
    assert str(wk.explain(wk.par, IMAGE, MASK)) == str(text)
    with pytest.raises(ValueError, match="op must be one of .*par.*, got 'pair'|got pair"):
        wk.explain("pair", IMAGE, MASK)


def test_automatic_choice_uses_the_kernel():
    assert wk.explain("par", IMAGE, MASK).chosen == ("cpu" if "_C" not in _native.missing else "reference")


def test_explicit_request_that_cannot_run_raises_with_the_reason():
    with pytest.raises(wk.BackendUnavailable, match="backend='triton' cannot run this call: "):
        wk.par(IMAGE, MASK, (1,), 1, backend="triton")
    with pytest.raises(ValueError, match="no such backend; expected one of cuda, triton, cpu, reference"):
        wk.par(IMAGE, MASK, (1,), 1, backend="gpu")


def test_precedence(monkeypatch):
    seen = []
    monkeypatch.setattr(api.reference, "par", lambda *a, **k: seen.append("reference") or MASK)
    with wk.use_backend("reference"):
        wk.par(IMAGE, MASK, (1,), 1)
        assert seen == ["reference"]
        if "_C" not in _native.missing:
            wk.par(IMAGE, MASK, (1,), 1, backend="cpu")
            with wk.use_backend("cpu"):
                wk.par(IMAGE, MASK, (1,), 1)
        assert seen == ["reference"]
    with pytest.raises(ValueError, match="name must be one of"), wk.use_backend("quick"):
        raise AssertionError("not reached")


def test_the_environment_variable():
    code = "import torch, wsss_kernels as wk; print(wk.explain('par', torch.rand(1, 3, 4, 5), torch.rand(1, 2, 4, 5)).chosen)"

    def run(value):
        return subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "WSSS_KERNELS_BACKEND": value}, capture_output=True, text=True
        )

    assert run("reference").stdout.strip() == "reference"
    assert "WSSS_KERNELS_BACKEND must be one of" in run("fast").stderr


def test_info_lists_every_operator():
    text = wk.info()
    assert all(f"  {name} " in text for name in OPERATORS) and torch.__version__ in text


@pytest.mark.skipif("_C" in _native.missing, reason="measures the compiled kernels, which are not installed")
def test_overhead_over_the_raw_operator():
    """Under 30 µs on tiny input (the fastest of many runs: what the code costs, not what the machine adds)."""
    raw, image, mask = api._fwd["cpu"], torch.rand(1, 1, 1, 1), torch.rand(1, 1, 1, 1)

    def fastest(function):
        times = []
        for _ in range(3000):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    public = fastest(lambda: wk.par(image, mask, (1,), 0))
    opaque = fastest(lambda: raw(image, mask, [1], 0, False, 0.3, 0.3, 0.01, True))
    assert public - opaque < 30e-6

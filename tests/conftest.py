"""Fixtures of the whole suite. What runs where is decided by the specs and by what this machine has."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: threads that wait for work must not spin, or a busy machine takes minutes for what takes seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

from wsss_kernels import registry
from wsss_kernels.testing import runnable_backends

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import InterpretedFunction

    _call, _called = InterpretedFunction.__call__, set()

    def _call_patched(self, *args, **kwargs):
        """Every call of a function by a kernel patches triton.language anew: most of the interpreter's time. Once is enough."""
        if self in _called:
            return self.rewrite()(*args, **kwargs)
        _called.add(self)
        return _call(self, *args, **kwargs)

    InterpretedFunction.__call__ = _call_patched

GOLDEN = Path(__file__).parent / "golden"


def golden(pattern: str) -> list:
    """Parameters for the golden vectors of the released implementations: name → arrays as tensors."""
    files = sorted(GOLDEN.glob(pattern))
    assert files, f"no golden vectors match {pattern}"
    return [pytest.param(file, id=file.stem) for file in files]


def load(file: Path) -> dict:
    with np.load(file) as arrays:
        return {name: torch.from_numpy(arrays[name]) if arrays[name].ndim else arrays[name].item() for name in arrays.files}


def backend_params(*, with_reference: bool = False) -> list:
    """(spec, backend, device) for everything that can run here."""
    return [
        pytest.param(spec, backend, device, id=f"{spec.name}-{backend}")
        for spec in registry.specs()
        for backend, device in runnable_backends(spec) + ([("reference", "cpu")] if with_reference else [])
    ]


def sample_params(*, small: bool = False) -> list:
    """(spec, backend, device, sample), only small samples where the backend is emulated."""
    found = []
    for spec in registry.specs():
        for backend, device in runnable_backends(spec):
            emulated = backend in ("cuda", "triton") and device == "cpu"
            found += [
                pytest.param(spec, backend, device, sample, id=f"{spec.name}-{backend}-{sample.note}")
                for sample in spec.samples()
                if sample.small or not (small or emulated)
            ]
    return found


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

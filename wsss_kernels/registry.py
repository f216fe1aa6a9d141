"""Finds the operators: every folder of `wsss_kernels/ops` with a `spec.py` holding `SPECS`."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from . import ops
from ._spec import OpSpec


@functools.cache
def specs() -> tuple[OpSpec, ...]:
    """The specs of all operators, sorted by name."""
    folders = sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg)
    found = [spec for folder in folders for spec in importlib.import_module(f"{ops.__name__}.{folder}.spec").SPECS]
    return tuple(sorted(found, key=lambda spec: spec.name))


def spec(name: str) -> OpSpec:
    """The spec of one operator, by its public name."""
    for candidate in specs():
        if candidate.name == name:
            return candidate
    raise ValueError(f"there is no operator {name!r}; there are {', '.join(s.name for s in specs())}")

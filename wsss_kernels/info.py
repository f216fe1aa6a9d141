"""`wsss_kernels.info()` and `python -m wsss_kernels.info`: what is installed, what is missing, why, and what to do."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import (
    _native,
    ops,  # noqa: F401  (registers the operators)
)
from ._dispatch import BACKENDS, OPERATORS


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> str:
    """A text to read, or to paste into a bug report."""
    lines = [
        f"wsss_kernels  {_version('wsss_kernels')}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"triton        {_version('triton')}",
    ]
    if _native.extension is not None:
        lines.append(f"cpu kernels   {_native.extension.build_info()}; running at {_native.extension.cpu_capability()}")
    else:
        lines.append(f"cpu kernels   missing: {_native.missing['_C']}")
    lines.append(f"cuda kernels  {'loaded' if '_cuda' not in _native.missing else 'missing: ' + _native.missing['_cuda']}")
    lines.append(f"gpus          {', '.join(_gpus()) or 'none visible'}")
    lines.append("operators     (backends that are compiled; the reference always runs)")
    for name, operator in sorted(OPERATORS.items()):
        there = [b.name for b in operator.backends if all(b.name in raw for raw in operator.raw)]
        lines.append(f"  {name:<28}{', '.join(b for b in BACKENDS if b in there) or 'reference only'}")
    return "\n".join(lines)


def _gpus() -> list[str]:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())]


if __name__ == "__main__":
    print(info())

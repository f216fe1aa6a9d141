"""Fused CPU, CUDA and Triton operators with autograd for weakly supervised semantic segmentation.

`wsss_kernels.info()` says what is compiled and why something is missing; `wsss_kernels.explain(op, ...)` which backend
runs a call and why. Importing this module touches neither CUDA nor Triton.
"""

from . import distributed, ops
from ._dispatch import BackendUnavailable, explain, use_backend
from .ops import *
from .patch import patch

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "distributed", "explain", "info", "patch", "use_backend", *ops.__all__]  # noqa: F405


def __getattr__(name: str):
    # Imported when it is asked for: `python -m wsss_kernels.info` must be the first to import that module.
    if name == "info":
        from .info import info

        globals()["info"] = info  # over the submodule, which the import has bound to the same name
        return info
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

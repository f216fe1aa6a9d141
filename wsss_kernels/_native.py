"""Loads the compiled extension, remembers why it is missing, and declares raw operators.

Two libraries: `_C` (CPU operators, needs no CUDA) and `_cuda` (CUDA operators, loaded only under a CUDA PyTorch).
Either may be absent (installed without a compiler) or broken (built for something else); both are states that
`wsss_kernels.info()` explains, as is a library that is older than the Python files: its operators would be called with
other arguments than they were compiled for, so none of it is used. A warning says so where the package is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

_HERE = Path(__file__).parent
REBUILD = "reinstall with `pip install --no-build-isolation --force-reinstall --no-deps .` in the source tree"

extension = None
"""The pybind11 module `_C`, or None."""
missing: dict[str, str] = {}
"""Why a library is not loaded, by name ("_C", "_cuda"). Empty when everything is there."""

cuda_libraries: list[str] = []
"""The loaded libraries of CUDA kernels: the real one, the emulator's."""


def _warn(message: str) -> None:
    """A warning at the line outside this package that imports it."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((str(_HERE), "<frozen importlib")):
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__"), registry)


def _load_cpu() -> None:
    global extension
    if not list(_HERE.glob("_C.*so")):
        missing["_C"] = (
            "wsss_kernels was installed without its compiled kernels (no C++ compiler, no PyTorch where the build ran, or WSSS_BUILD=none); "
            + REBUILD
        )
        return
    try:
        extension = importlib.import_module("wsss_kernels._C")
    except ImportError as error:
        missing["_C"] = f"the compiled kernels are present but cannot be loaded ({error}); {REBUILD}"


def _load_cuda() -> None:
    if torch.version.cuda is None:
        missing["_cuda"] = f"PyTorch {torch.__version__} is a CPU build"
        return
    libraries = list(_HERE.glob("_cuda.*so"))
    if not libraries:
        missing["_cuda"] = (
            "wsss_kernels was built without CUDA (no matching nvcc, or WSSS_BUILD=cpu); install a CUDA toolkit of PyTorch's major version and "
            + REBUILD
        )
        return
    try:
        torch.ops.load_library(str(libraries[0]))
        cuda_libraries.append(str(libraries[0]))
    except OSError as error:
        missing["_cuda"] = f"the CUDA kernels are present but cannot be loaded ({error}); {REBUILD}"


_load_cpu()
if extension is None:
    missing["_cuda"] = missing["_C"]
    _warn(f"{missing['_C']}. The slow PyTorch reference is used meanwhile.")
else:
    _load_cuda()
    if "cannot be loaded" in missing.get("_cuda", ""):
        _warn(missing["_cuda"])

EMULATED = "WSSS_CUDA_EMULATOR" in os.environ
"""The CUDA kernels run on CPU tensors, in the emulator library that WSSS_CUDA_EMULATOR names (tests only)."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton kernels run on CPU tensors in Triton's interpreter (tests only)."""
AHEAD = "WSSS_TRITON_AHEAD" in os.environ
"""Triton kernels are compiled for CPU tensors and not run: their results are undefined (`wsss_kernels.aot` only)."""
if EMULATED:
    torch.ops.load_library(os.environ["WSSS_CUDA_EMULATOR"])
    cuda_libraries.append(os.environ["WSSS_CUDA_EMULATOR"])

_fragments: dict[str, torch.library.Library] = {}


def _fragment(namespace: str) -> torch.library.Library:
    if namespace not in _fragments:
        _fragments[namespace] = torch.library.Library(namespace, "FRAGMENT")
    return _fragments[namespace]


def _define(namespace: str, schema: str, fake: Callable) -> Callable:
    name = schema.partition("(")[0]
    _fragment(namespace).define(schema)
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=_fragment(namespace))
    return getattr(getattr(torch.ops, namespace), name).default


def _triton_launcher(module: str, name: str) -> Callable:
    def launch(*args):
        return getattr(importlib.import_module(module), name)(*args)

    return launch


_compiled_ops: list[dict[str, Callable]] = []


def _compiled(name: str, schema: str) -> Callable | None:
    """The operator of the library; `None`, and nothing of the library is used any more, if it is another one than declared."""
    global extension
    native = getattr(getattr(torch.ops.wsss, name, None), "default", None)
    if native is not None and native._schema == torch._C.parse_schema(f"wsss::{schema}"):
        return native
    found = f"has no operator {name}" if native is None else f"has {native._schema} instead of {schema}"
    extension = None
    missing["_C"] = missing["_cuda"] = f"the compiled kernels are older than the Python files (the library {found}); {REBUILD}"
    for raw in _compiled_ops:
        if raw.get("cuda") is raw.pop("cpu"):
            del raw["cuda"]
    _compiled_ops.clear()
    _warn(f"{missing['_C']}. The slow PyTorch reference is used meanwhile.")
    return None


def raw_op(schema: str, fake: Callable, *, triton: str | None = None, triton_fake: Callable | None = None) -> dict[str, Callable]:
    """Declares the opaque operator `schema`, and returns its callables by backend: `raw["cpu"](...)`.

    Args:
        schema: as in C++, without namespace: `"par_fwd(Tensor image, ...) -> Tensor"`. The CPU and CUDA kernels are
            registered in C++ under `wsss::`; a compiled library with another schema is stale and not used at all.
        fake: the shape function, called with the operator's arguments.
        triton: the module that holds the Triton launcher, a function with the operator's name and arguments. It is
            imported at the first call, and lives under `wsss_triton::`, beside the CUDA kernel and not instead of it.
        triton_fake: its shape function, where it keeps other statistics for its backward than the C++ kernels.
    """
    name = schema.partition("(")[0]
    raw: dict[str, Callable] = {}
    native = _compiled(name, schema) if extension is not None else None
    if native is not None:
        torch.library.register_fake(f"wsss::{name}", fake, lib=_fragment("wsss"))
        raw["cpu"] = native
        if "_cuda" not in missing:
            raw["cuda"] = native
        _compiled_ops.append(raw)
    if EMULATED and torch._C._dispatch_has_kernel(f"wsss_emul::{name}"):  # operators without a CUDA kernel are unknown there
        raw["cuda"] = _define("wsss_emul", schema, fake)
    if triton is not None:
        raw["triton"] = _define("wsss_triton", schema, triton_fake or fake)
        for key in ("CUDA", "CPU") if INTERPRETED or AHEAD else ("CUDA",):
            _fragment("wsss_triton").impl(name, _triton_launcher(triton, name), key)
    return raw

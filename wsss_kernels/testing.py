"""The tolerance rule and what the test matrix is made of. Also useful to test code that replaces one of our operators.

Truth is the reference in float64. Let e_ref be the largest error of the reference in float32, its result rounded to the
tested dtype. A kernel passes if its largest error is at most 2·e_ref + 4·eps(dtype)·max|truth| (gradients: 3·e_ref +
8·eps·max|truth|); in float64 if it is at most 1e-12·max|truth| (gradients 1e-10). Integer and boolean outputs are exact.
The cosine with a non-zero truth is at least 1 − 1e-6 (half types 1 − 1e-3). No NaN or infinity that the truth does not have.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._spec import OpSpec, Sample

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it replaced; lists, tuples, named tuples and dictionaries are entered."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(v, change) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(v, change) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def cast(value: Any, dtype: torch.dtype, device: str | torch.device | None = None) -> Any:
    """Floating tensors to `dtype`, all tensors to `device`. Never returns a tensor of the sample itself."""
    return map_tensors(value, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype, copy=True))


def flatten(value: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in flatten(v)] if isinstance(value, (list, tuple)) else []


def arguments(function: Callable, args: Sequence, kwargs: dict) -> dict[str, Any]:
    """The call's arguments by parameter name, in order."""
    return dict(inspect.signature(function).bind(*args, **kwargs).arguments)


def gradient_tensors(spec: OpSpec, sample: Sample | None, args: tuple, kwargs: dict) -> list[Tensor]:
    """The floating tensors of a call that have a gradient, in the order of the signature."""
    named = arguments(spec.reference, args, kwargs)
    return [t for name in spec.gradients for t in flatten(named.get(name)) if t.is_floating_point()]


def _differences(actual: Tensor, truth: Tensor) -> Tensor:
    """|actual − truth| in float64, where both are finite; raises where one is not and the other is."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    finite = torch.isfinite(truth)
    same = finite & torch.isfinite(actual) | (truth == actual) | (truth.isnan() & actual.isnan())
    if not bool(same.all()):
        raise AssertionError(f"{int((~same).sum())} of {same.numel()} values are NaN or infinite where the truth is not, or the reverse")
    return (actual - truth)[finite].abs()


def _largest(differences: Tensor) -> float:
    return float(differences.max()) if differences.numel() else 0.0


def assert_matches_truth(
    actual: Tensor,
    truth: Tensor,
    reference: Tensor | None,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    bound: float | None = None,
    what: str = "result",
) -> float:
    """Holds one tensor to the tolerance rule.

    Args:
        actual: what the kernel gave.
        truth: the reference in float64.
        reference: the reference in float32; `None` in float64, where it is not needed.
        dtype: the tested dtype.
        gradient: the wider factors for gradients.
        bound: an absolute bound instead, for an option whose purpose is lower precision.

    Returns:
        error / allowed error, for reports.

    Raises:
        AssertionError: with the error, what was allowed, and why.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if not truth.is_floating_point():
        if not torch.equal(actual.cpu().to(truth.dtype), truth.cpu()):
            raise AssertionError(f"{what}: {int((actual.cpu() != truth.cpu()).sum())} of {truth.numel()} integer or boolean values differ")
        return 0.0
    error = _largest(_differences(actual, truth))
    finite = truth.double().cpu()[torch.isfinite(truth).cpu()]
    largest = _largest(finite.abs())
    if bound is not None:
        allowed, rule = bound, "the option's own bound"
    elif dtype == torch.float64:
        allowed, rule = (1e-10 if gradient else 1e-12) * largest, "float64"
    else:
        if reference is None:
            raise TypeError("assert_matches_truth: reference is needed below float64")
        e_ref = _largest(_differences(reference.to(actual.dtype), truth))
        allowed = (3 if gradient else 2) * e_ref + (8 if gradient else 4) * torch.finfo(dtype).eps * largest
        rule = f"e_ref {e_ref:.3e}, largest truth {largest:.3e}"
    if error > allowed:
        raise AssertionError(f"{what}: error {error:.3e} > {allowed:.3e} allowed ({rule}) in {dtype}")
    norm = float(finite.norm())
    if norm > 0 and bound is None:
        given = actual.detach().double().cpu()[torch.isfinite(truth).cpu()]
        cosine = float((given * finite).sum() / (given.norm() * norm)) if float(given.norm()) > 0 else 0.0
        least = 1 - (1e-3 if dtype in HALVES else 1e-6)
        if cosine < least:
            raise AssertionError(f"{what}: cosine with the truth {cosine:.9f} < {least}")
    return error / allowed if allowed > 0 else 0.0


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Uninitialised tensors and kernel workspaces hold NaN (integers: their largest value) inside this context."""
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ["WSSS_POISON"] = "1"
    try:
        yield
    finally:
        del os.environ["WSSS_POISON"]
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory(function: Callable[[], Any]) -> tuple[int, Any]:
    """Peak bytes that a call allocates beyond what is allocated before it, and its result.

    On a GPU the allocator's own statistics. On a CPU PyTorch's allocations, from the profiler, and the kernels'
    workspaces, from our own account; the sum of both peaks, which is never less than the peak of the sum.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    if _native.extension is not None:
        _native.extension.workspace_peak(reset=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr whenever it starts
    with torch.profiler.profile(profile_memory=True) as profiler:
        result = function()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak + (_native.extension.workspace_peak() if _native.extension is not None else 0), result


def launch_paths() -> set[str]:
    """The launch paths that kernels of this process have taken, from every loaded library."""
    found = set(_native.extension.paths()) if _native.extension is not None else set()
    for library in _native.cuda_libraries:
        function = ctypes.CDLL(library).wsss_paths
        function.restype = ctypes.c_char_p
        found |= set(function().decode().split())
    if "wsss_kernels._triton" in sys.modules:
        found |= sys.modules["wsss_kernels._triton"].paths
    return found


def runnable_backends(spec: OpSpec) -> list[tuple[str, str]]:
    """(backend, device) pairs that can run here: real ones, the CUDA emulator, Triton's interpreter."""
    pairs = [("cpu", "cpu")] if "cpu" in spec.backends and "_C" not in _native.missing else []
    gpu = torch.cuda.is_available()
    for backend, emulated in (("cuda", _native.EMULATED), ("triton", _native.INTERPRETED)):
        if backend in spec.backends and (emulated or (gpu and (backend == "triton" or "_cuda" not in _native.missing))):
            pairs.append((backend, "cpu" if emulated else "cuda"))
    return pairs

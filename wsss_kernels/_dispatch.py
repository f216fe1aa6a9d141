"""The one place where a backend is chosen.

Precedence: the `backend=` argument, `use_backend`, the environment variable WSSS_KERNELS_BACKEND (read once, at import),
automatic. The choice looks at metadata only (device, dtype, sizes), outside the opaque operator, so `torch.compile` sees
no branch on data. An explicit request that cannot run raises with the reason; the automatic choice never fails where
the reference can run.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _native

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""In order of preference."""

OPERATORS: dict[str, Operator] = {}
"""Every operator by its public name; filled when its api module is imported."""
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_ENVIRONMENT = os.environ.get("WSSS_KERNELS_BACKEND") or None
if _ENVIRONMENT not in (None, *BACKENDS):
    raise ValueError(f"WSSS_KERNELS_BACKEND must be one of {', '.join(BACKENDS)}, got {_ENVIRONMENT!r}")
_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("wsss_kernels backend", default=_ENVIRONMENT)
_inside = 0
"""How many `use_backend` are open in all threads. Only then is the variable read: Dynamo cannot before PyTorch 2.14."""
_counting = threading.Lock()


def requested() -> str | None:
    """The backend that `use_backend` or the environment asks for."""
    return _requested.get() if _inside else _ENVIRONMENT


_PRETENDING = _native.EMULATED or _native.INTERPRETED or _native.AHEAD
"""Kernels for a GPU take CPU tensors here (tests only)."""
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class BackendUnavailable(ValueError, RuntimeError):
    """A backend that was asked for by name cannot run this call. (The argument is at fault, or the machine: hence both.)"""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Args:
        name: `"cuda"`, `"triton"` or `"cpu"`. The reference needs no entry.
        dtypes: the floating-point types that it takes.
        can_use: `(*tensors) -> None | reason`, for what only the operator knows. Metadata only.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    can_use: Callable[..., str | None] | None = None


@dataclass
class Operator:
    """A public operator: its name and its implementations, in order of preference."""

    name: str
    backends: tuple[Backend, ...]
    note: Callable[..., str | None] | None = None
    """`(bound arguments as keywords) -> text`: what `explain` adds, such as which variant a size selects."""
    raw: list[dict[str, Callable]] = field(default_factory=list)

    def __post_init__(self):
        OPERATORS[self.name] = self

    def raw_op(self, schema: str, fake: Callable, **options) -> dict[str, Callable]:
        """Declares one of the operator's opaque kernels; see `_native.raw_op`."""
        self.raw.append(_native.raw_op(schema, fake, **options))
        return self.raw[-1]

    def resolve(self, tensors: Sequence[torch.Tensor], backend: str | None = None) -> str:
        """The backend that runs this call."""
        wanted = backend or requested()
        if wanted is not None:
            reason = self.reason(wanted, tensors)
            if reason is not None:
                raise BackendUnavailable(f"{self.name}: backend={wanted!r} cannot run this call: {reason}")
            return wanted
        cpu = tensors[0].is_cpu and not _PRETENDING
        for candidate in self.backends:
            # Most calls end here: what is not for this device need not say why.
            if (not cpu or candidate.name == "cpu") and self._why_not(candidate, tensors) is None:
                return candidate.name
        return "reference"

    def reason(self, backend: str, tensors: Sequence[torch.Tensor]) -> str | None:
        """None if the backend can run a call with these tensors, else why not."""
        if backend == "reference":
            return None
        if backend not in BACKENDS:
            return f"there is no such backend; expected one of {', '.join(BACKENDS)}"
        for candidate in self.backends:
            if candidate.name == backend:
                return self._why_not(candidate, tensors)
        return f"{self.name} has no {backend} implementation"

    def _why_not(self, candidate: Backend, tensors: Sequence[torch.Tensor]) -> str | None:
        # Plain loops: this runs at every call, and a generator costs as much as all the rest.
        for raw in self.raw:
            if candidate.name not in raw:
                return _why_not_compiled(candidate.name)
        reason = _device_reason(candidate.name, tensors[0])
        if reason is not None:
            return reason
        for tensor in tensors:
            if tensor.dtype not in candidate.dtypes and tensor.is_floating_point():
                return f"its kernels take {', '.join(str(d).removeprefix('torch.') for d in candidate.dtypes)}, got {str(tensor.dtype).removeprefix('torch.')}"
        return candidate.can_use(*tensors) if candidate.can_use is not None else None


class _NoContext:
    """The context of an `autograd.Function` whose result needs no gradient: what it is given is forgotten."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass

    mark_non_differentiable = save_for_backward


def _distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments with an alias for every tensor that was there before: Dynamo refuses a function that is given one twice."""
    result: list[Any] = []
    for value in args:
        again = isinstance(value, torch.Tensor) and any(value is other for other in result)
        result.append(value.view_as(value) if again else value)
    return result


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`; where no tensor needs a gradient its forward alone, which is several microseconds cheaper."""
    if torch.is_grad_enabled():
        for value in args:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                return function.apply(*(_distinct(args) if torch.compiler.is_compiling() else args))
    if forward_ad._current_level >= 0:  # a tangent must be refused, not lost
        return function.apply(*args)
    return function.forward(_NoContext(), *args)


def _why_not_compiled(backend: str) -> str:
    if backend == "cpu":
        return _native.missing.get("_C", "not compiled")
    return _native.missing.get("_cuda" if backend == "cuda" else "_C", "not compiled")


def _device_reason(backend: str, tensor: torch.Tensor) -> str | None:
    if backend == "cpu":
        return None if tensor.is_cpu else f"its kernels run on CPU tensors, got a {tensor.device.type} tensor"
    if backend == "triton" and not _HAS_TRITON:
        return "the package triton is not installed"
    here = _native.EMULATED if backend == "cuda" else _native.INTERPRETED or _native.AHEAD
    if tensor.is_cuda or (tensor.is_cpu and here):
        return None
    return f"its kernels run on CUDA tensors, got a {tensor.device.type} tensor"


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Every operator called inside runs on this backend, or raises with the reason. `None` chooses automatically.

    The setting belongs to the thread (to the task in asyncio); a thread that is started inside does not inherit it. Before PyTorch 2.14
    compiled code has a graph break inside, and `fullgraph=True` is refused.
    """
    if name not in (None, *BACKENDS):
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    global _inside
    before = _requested.set(name)
    with _counting:
        _inside += 1
    try:
        yield
    finally:
        with _counting:
            _inside -= 1
        _requested.reset(before)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. Printing it gives a readable table."""

    operator: str
    chosen: str
    reasons: dict[str, str | None]
    note: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen}"]
        for backend, reason in self.reasons.items():
            mark = "->" if backend == self.chosen else "  "
            lines.append(f" {mark} {backend:<10} {'can run' if reason is None else 'no: ' + reason}")
        return "\n".join(lines + ([f"    {self.note}"] if self.note else []))

    __repr__ = __str__


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """Says for each backend whether it can run the call `op(*args, **kwargs)`, why not, and which one is chosen.

    Judged by devices, dtypes and what is installed; shapes and values are checked by the call itself.

    Args:
        op: an operator of `wsss_kernels`, or its name.
        *args, **kwargs: as for the operator itself.
    """
    import wsss_kernels

    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATORS:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(OPERATORS))}, got {name}")
    operator, public = OPERATORS[name], getattr(wsss_kernels, name)
    bound = inspect.signature(public).bind(*args, **kwargs)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend", None)
    tensors = [
        t
        for value in bound.arguments.values()
        for t in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(t, torch.Tensor)
    ]
    if not tensors:
        raise ValueError(f"explain: the call of {operator.name} has no tensor argument")
    reasons = {name: operator.reason(name, tensors) for name in BACKENDS}
    try:
        chosen = operator.resolve(tensors, backend)
    except BackendUnavailable as error:
        chosen = f"none ({error})"
    note = operator.note(**bound.arguments) if operator.note is not None else None
    return Explanation(operator.name, chosen, reasons, note)

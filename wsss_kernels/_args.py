"""Argument checks and dtype policy that the operators share. Everything here raises before any kernel starts."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Sequence

import torch

INTEGERS = (torch.int64, torch.int32, torch.uint8)
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALVES)
_SMALLEST = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float64).max


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {'×'.join(map(str, value.shape)) or '()'}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:  # an array of NumPy or of another library
        return f"{type(value).__name__} of shape {'×'.join(map(str, shape))}"
    brief = reprlib.repr(value)
    return brief if isinstance(value, (int, float, str, bool, type(None))) else f"{type(value).__name__} {brief}"


def tensor(op: str, name: str, value: object, shape: str, *, kind: str = "floating", spatial: int = 0) -> None:
    """Checks that `value` is a tensor of the rank that `shape` spells ("B×C×H×W"; a leading "…" allows more dimensions).

    Args:
        kind: `"floating"`, `"label"` (int64, int32, uint8), or `"any"` (also bool).
        spatial: how many trailing dimensions must not be 0.
    """
    if not (
        isinstance(value, torch.Tensor) and (value.dtype in FLOATS if kind == "floating" else kind == "any" or value.dtype in INTEGERS)
    ):
        raise TypeError(_expected(op, name, value, shape, kind))
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}; use {name}.to_dense()")
    rank = shape.count("×") + 1
    if value.dim() < rank - 1 if shape[0] == "…" else value.dim() != rank:
        raise ValueError(_expected(op, name, value, shape, kind))
    if spatial and 0 in value.shape[-spatial:]:
        raise ValueError(f"{_expected(op, name, value, shape, kind)}: a spatial extent must not be 0")


def _expected(op: str, name: str, value: object, shape: str, kind: str) -> str:
    words = {"floating": "a floating-point tensor", "label": "an int64, int32 or uint8 tensor", "any": "a tensor"}[kind]
    return f"{op}: {name} must be {words} of shape {shape}, got {describe(value)}"


def same(op: str, first: str, a: object, second: str, b: object, what: str) -> None:
    """Checks that two extents agree: `same("par", "image", 2, "mask", 3, "batch size")`."""
    if a != b:
        a, b = (tuple(x) if isinstance(x, torch.Size) else x for x in (a, b))
        raise ValueError(f"{op}: {first} and {second} must have the same {what}, got {a} and {b}")


def integer(op: str, name: str, value: object, minimum: int) -> int:
    if type(value) is int and minimum <= value < 2**31:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an int, got {describe(value)}")
    if value.__index__() < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}")
    if value.__index__() >= 2**31:
        raise ValueError(f"{op}: {name} must be less than 2^31, got {value}")
    return value.__index__()


def number(op: str, name: str, value: object, *, positive: bool = False) -> float:
    """A finite number of Python or NumPy (not NaN, not infinite); if `positive` one that float32 can hold as more than 0."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {describe(value)}")
    # comparisons, not math.isfinite: torch.compile makes a symbol of a number that changes from call to call
    plain = value if isinstance(value, (float, int)) else float(value)
    if not -_LARGEST <= plain <= _LARGEST or (positive and plain < _SMALLEST):
        raise ValueError(f"{op}: {name} must be a {'positive ' if positive else ''}finite number, got {value}")
    return float(plain)


def flag(op: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {describe(value)}")
    return value


def scalar(op: str, name: str, value: object, like: torch.Tensor, *, positive: bool = False) -> torch.Tensor:
    """A float64 tensor of one element on the device of `like`, for a parameter that may be learnt.

    A number is checked as in `number`. A 0-d tensor keeps its gradient, must share the dtype of `like` (under autocast it may
    have any), and its value is not looked at, which would stop a GPU.
    """
    if not isinstance(value, torch.Tensor):
        return held(number(op, name, value, positive=positive), like.device)
    return _learnt(op, name, value, like).double()


def held(value: float, device: torch.device, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A number as a tensor without dimensions, filled on its device: a copy from the host would stop a GPU.

    torch.compile makes an input of a number that changes from call to call if a tensor is multiplied by it; the contents of a new
    tensor it would compile for each value.
    """
    if torch.compiler.is_compiling():
        return (torch.ones((), dtype=torch.float64, device=device) * value).to(dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _learnt(op: str, name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point() or value.dim() != 0:
        raise TypeError(f"{op}: {name} must be a number or a floating-point tensor of shape (), got {describe(value)}")
    if value.device != like.device:
        raise TypeError(f"{op}: {name} must be on {like.device} as the other tensors, got {value.device}")
    if value.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise TypeError(f"{op}: {name} must have the dtype of the other tensors, {like.dtype}, got {value.dtype}")
    return value


def scalars(op: str, values: dict[str, object], like: torch.Tensor, *, positive: Sequence[str] = ()) -> torch.Tensor:
    """`scalar` of several parameters, in one tensor of as many elements."""
    tensors = [_learnt(op, name, v, like) for name, v in values.items() if isinstance(v, torch.Tensor)]
    if tensors:
        if len(tensors) == len(values) and all(t.dtype == tensors[0].dtype for t in tensors):
            return torch.stack(tensors).double()  # one conversion instead of one for each
        return torch.stack([scalar(op, name, v, like, positive=name in positive) for name, v in values.items()])
    numbers = [number(op, name, v, positive=name in positive) for name, v in values.items()]
    if like.is_cpu and not torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64)
    return torch.stack([held(n, like.device) for n in numbers])


def choice(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {describe(value)}")


def align(op: str, names: Sequence[str], tensors: Sequence[torch.Tensor], *, autocast: str = "input") -> list[torch.Tensor]:
    """One dtype and one device for the floating-point tensors of a call.

    Under autocast an operator with `autocast="fp32"` computes in float32 and one with `"input"` in the autocast dtype
    (float64 stays, as in PyTorch). Otherwise a mixture raises `TypeError`.
    """
    first, *others = tensors
    dtype, device = first.dtype, first.device
    alike = True
    for t in others:
        alike = alike and t.device == device and (t.dtype == dtype or not t.is_floating_point())
    if alike and not torch.is_autocast_enabled(device.type):
        return list(tensors)
    return _aligned(op, names, tensors, autocast)


def _aligned(op: str, names: Sequence[str], tensors: Sequence[torch.Tensor], autocast: str) -> list[torch.Tensor]:
    device = tensors[0].device
    for name, t in zip(names, tensors, strict=True):
        if t.device != device:
            raise TypeError(f"{op}: {names[0]} and {name} must be on one device, got {device} and {t.device}")
    if torch.is_autocast_enabled(device.type):
        target = torch.float32 if autocast == "fp32" else torch.get_autocast_dtype(device.type)
        tensors = [t.to(target) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]
    floating = [(name, t) for name, t in zip(names, tensors, strict=True) if t.is_floating_point()]
    for name, t in floating:
        if t.dtype != floating[0][1].dtype:
            raise TypeError(f"{op}: {floating[0][0]} and {name} must have one dtype, got {floating[0][1].dtype} and {t.dtype}")
    return list(tensors)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which kernels accumulate: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`t.to(dtype)`, which even where there is nothing to do costs more than the comparison."""
    return t if t.dtype == dtype else t.to(dtype)


def widen(backend: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """float32 copies of half-precision tensors for the CPU kernels, which compute in float32; other tensors as they are."""
    if backend != "cpu":
        return list(tensors)
    return [t.float() if t.dtype in HALVES else t for t in tensors]


def no_gradient(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuses tensors that require a gradient which this operator does not have (never a silent `None`)."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise NotImplementedError(f"{op}: there is no gradient with respect to {name}; pass {name}.detach()")

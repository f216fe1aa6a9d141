"""What an operator says of itself. Tests, benchmarks, `info` and the operator table are derived from its `OpSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._dispatch import Operator


@dataclass(frozen=True)
class Sample:
    """One call of an operator. Floating tensors are float64 and get the tested dtype from the tests.

    Args:
        note: what is special about it; part of the test's name.
        args, kwargs: as for the public function, without `backend`.
        small: small enough for the CUDA emulator, Triton's interpreter and `gradcheck` (a few hundred elements).
        gradcheck: `False` where the sample sits on a kink (documented in the note), so that no derivative exists.
        bound: for an option whose documented purpose is lower precision: `(truth, *args) -> largest absolute error`.
            Everything else is held to the tolerance rule.
        dtypes: the dtypes for which the sample is meant; all by default.
    """

    note: str
    args: tuple
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    small: bool = True
    gradcheck: bool = True
    bound: Callable[..., float] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Malformed:
    """A call that must raise before any kernel starts, with the argument's name and what was expected in the message."""

    note: str
    args: tuple
    kwargs: Mapping[str, Any]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Case:
    """A benchmark case at a shape that a method really uses.

    Args:
        name: short, with the sizes in it.
        make: `() -> (args, kwargs)`, float32 CPU tensors from a fixed seed.
        backward: also time forward + backward.
        quick: part of the short benchmark; the others only run on demand.
        gpu: of a size that only a GPU is asked for; left out where there is none.
        target: the ratio to the first baseline that the project promises on two CPU cores, if any.
        baselines: those of the spec's baselines that this case is compared with; all of them if empty.
    """

    name: str
    make: Callable[[], tuple[tuple, dict]]
    backward: bool = False
    quick: bool = True
    gpu: bool = False
    target: float | None = None
    baselines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one size.

    Args:
        variable: what grows, such as "N" or "H·W".
        cases: by its value.
        exponent: p of the time ∝ variable^p that the algorithm should need.
    """

    variable: str
    cases: Mapping[float, Case]
    exponent: float


@dataclass(frozen=True)
class OpSpec:
    """One public operator.

    Args:
        operator: its name and implementations.
        public, reference: the public function, and the same in plain PyTorch (same signature without `backend`).
        paper: the source equation.
        samples: typical, prime sizes, 1, empty, every launch path.
        gradients: names of the tensor parameters that have a gradient. A parameter that holds a list of tensors counts
            for all of them.
        refused: names of the floating-point tensor parameters that have none and raise if they require one.
        outputs: `"float"` outputs are held to the tolerance rule, `"exact"` ones must be equal although floating.
            Integer and boolean outputs are always exact.
        float32_outputs: indices of the outputs that are float32 for half-precision input (losses, distances, deviations).
        autocast: `"fp32"` or `"input"` (SPEC: the mark [fp32]).
        invariants: functions `(run) -> None` that assert a law of the operator; `run` is the public function, bound to
            the tested backend.
        malformed: calls that must raise.
        paths: the launch paths by backend; tests assert that the samples take all of them.
        cases: benchmark cases.
        sweeps: cases over its sizes, for the report.
        baselines: `name of a function in benchmarks/baselines/<folder>.py`, the first of which is the eager original.
        flops, bytes_moved, peak_bytes: of a call, from its arguments. `peak_bytes` is what the operator may allocate
            beyond inputs and outputs (tests allow 1.1 times as much).
        streaming: nothing N×N may be allocated (a stronger promise, checked with large N).
    """

    operator: Operator
    public: Callable[..., Any]
    reference: Callable[..., Any]
    paper: str
    samples: Callable[[], Sequence[Sample]]
    gradients: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    outputs: str = "float"
    float32_outputs: tuple[int, ...] = ()
    autocast: str = "input"
    invariants: tuple[Callable[[Callable[..., Any]], None], ...] = ()
    malformed: Callable[[], Sequence[Malformed]] = tuple
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cases: Sequence[Case] = ()
    sweeps: Sequence[Sweep] = ()
    baselines: tuple[str, ...] = ()
    flops: Callable[..., float] | None = None
    bytes_moved: Callable[..., float] | None = None
    peak_bytes: Callable[..., float] | None = None
    streaming: bool = False

    @property
    def name(self) -> str:
        return self.operator.name

    def widens(self, output: int) -> bool:
        return output in self.float32_outputs

    @property
    def folder(self) -> str:
        return self.public.__module__.split(".")[-2]

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(backend.name for backend in self.operator.backends)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*size: int, seed: int = 0) -> Tensor:
    """float64 normal numbers that are exactly representable in bfloat16, so that every dtype gets the same values."""
    return torch.randn(*size, generator=generator(seed), dtype=torch.float64).bfloat16().double()


def rand(*size: int, seed: int = 0) -> Tensor:
    """float64 uniform numbers in [0, 1), exactly representable in bfloat16."""
    return torch.rand(*size, generator=generator(seed), dtype=torch.float64).mul(255).floor().div(256)


def randint(high: int, *size: int, seed: int = 0) -> Tensor:
    return torch.randint(high, size, generator=generator(seed))

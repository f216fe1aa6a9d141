"""Measures one case: ours and the baselines in turn, after every one of them has been held to the right result."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from .._dispatch import explain
from .._spec import Case, OpSpec
from ..testing import assert_matches_truth, cast, flatten, gradient_tensors, peak_memory
from .about import PACKAGE, clock_mhz, commit, kernel_hash, machine, watched
from .row import Row, case_mode


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def peaks() -> tuple[float, float]:
    """(GB/s of a copy that no cache holds, GFLOP/s of a float32 product) of this machine, measured."""
    device = _device()
    size = 1 << (28 if device == "cuda" else 26)
    a, b = torch.ones(size, device=device), torch.empty(size, device=device)
    m = torch.rand(4096 if device == "cuda" else 1536, 4096 if device == "cuda" else 1536, device=device)
    b.copy_(a), m @ m  # to warm up
    times = alternate({"copy": lambda: b.copy_(a), "product": lambda: m @ m}, 1.0)
    best = {name: min(t) for name, t in times.items()}
    return 2 * a.numel() * 4 / best["copy"] / 1e6, 2 * m.shape[0] ** 3 / best["product"] / 1e6


def baselines(spec: OpSpec, case: Case) -> dict[str, Callable]:
    """The functions to compare with, the eager original first."""
    clone = (PACKAGE.parent / "benchmarks/baselines").is_dir()
    if clone and str(PACKAGE.parent) not in sys.path:  # called from another folder
        sys.path.append(str(PACKAGE.parent))
    try:
        module = importlib.import_module(f"benchmarks.baselines.{spec.folder}")
    except ImportError as error:
        if clone:
            print(f"{spec.name}: the plain reference stands in for the baselines: {error}", file=sys.stderr)
        return {"reference": spec.reference}
    return {name: getattr(module, name) for name in case.baselines or spec.baselines} or {"reference": spec.reference}


def compiled(function: Callable) -> Callable:
    """`torch.compile` of a baseline, for one shape."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


@functools.cache
def _normal(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(7)).bfloat16()


def _cotangent(t: torch.Tensor) -> torch.Tensor:
    """Random, the same for every provider: under ones the gradient of a normalisation is 0 but for rounding."""
    return _normal(*t.shape).to(t)


def bind(spec: OpSpec, function: Callable, args: tuple, kwargs: dict, mode: str) -> Callable[[], list[torch.Tensor]]:
    """A function of one provider that gives the results, and unless the mode is `forward` the gradients behind them."""
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return flatten(function(*args, **kwargs))

        return forward
    inputs = [t.requires_grad_() for t in gradient_tensors(spec, None, args, kwargs)]
    cotangents: list[torch.Tensor] = []

    def gradients(results, **more):
        live = [t for t in results if t.requires_grad]
        if not cotangents:  # at the first call, which is not timed: on a GPU the copy from the host would outlast many an operator
            cotangents.extend(map(_cotangent, live))
        found = torch.autograd.grad(live, inputs, cotangents, **more)
        return [*(t.detach() for t in results), *found]

    if mode == "forward+backward":
        return lambda: gradients(flatten(function(*args, **kwargs)))
    graph: list[torch.Tensor] = []

    def backward():
        if not graph:  # the first call, which is not timed
            graph.extend(flatten(function(*args, **kwargs)))
        return gradients(graph, retain_graph=True)

    return backward


@functools.cache
def _flush() -> torch.Tensor:
    """Larger than any GPU's second-level cache: zeroed before each run, so that every run finds its inputs in memory."""
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def _milliseconds(call: Callable) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    _flush().zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


_QUICK = 5.0  # milliseconds


def alternate(calls: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, all run in turn until the time is spent; at least 3 runs each, quick calls more.

    The caller has warmed them up; quick calls are warmed up again at every turn.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or min(map(len, times.values())) < 3:
        slowest = max((t[-1] for t in times.values() if t), default=0.0)
        for name, call in calls.items():
            spent = 0.0
            if times[name] and times[name][-1] < _QUICK:
                call()  # untimed: what ran in between has taken the caches, and a quick call would show little else
            # as many runs of a quick call as fit into a fifth of the slowest one, so that its percentiles mean something
            while spent == 0.0 or (spent < slowest / 5 and len(times[name]) < 200):
                times[name].append(_milliseconds(call))
                spent += times[name][-1]
        if min(map(len, times.values())) >= 200:
            break
    return times


class Gate:
    """What every provider's result is held to: the float64 reference, computed once per case, where the providers run."""

    def __init__(self, spec: OpSpec, case: Case, mode: str):
        args, kwargs = case.make()
        exact = {k: v for k, v in kwargs.items() if k != "exact"}
        self.gradients = len(gradient_tensors(spec, None, args, kwargs)) if mode != "forward" else 0
        self.less_precise = "exact" in kwargs
        self.ties = spec.outputs != "exact"  # labels that a comparison of float32 numbers decides
        with torch.backends.cudnn.flags(allow_tf32=False):  # float32 means float32, in convolutions too
            self.truth, self.coarse = (
                [t.cpu() for t in bind(spec, spec.reference, *cast((args, exact), dtype, _device()), mode)()]
                for dtype in (torch.float64, torch.float32)
            )

    def check(self, name: str, results: list[torch.Tensor]) -> float:
        """The error ratio of ours, 0 for a baseline.

        Raises:
            AssertionError: a result is wrong.
        """
        if len(results) != len(self.truth):
            raise AssertionError(f"{name}: {len(results)} tensors, expected {len(self.truth)}")
        worst = 0.0
        for index, (actual, wanted, reference) in enumerate(zip(results, self.truth, self.coarse, strict=True)):
            gradient = index >= len(self.truth) - self.gradients
            if name == "ours" and not self.less_precise:
                worst = max(worst, assert_matches_truth(actual, wanted, reference, torch.float32, gradient=gradient))
            elif name != "ours" and self.ties and not wanted.is_floating_point() and actual.shape == wanted.shape:
                # Where two distances are equal to rounding, a baseline in float32 may choose the other label.
                differing = int((actual.cpu() != wanted).sum())
                if differing > 1e-3 * wanted.numel():
                    raise AssertionError(f"{name}: {differing} of {wanted.numel()} integer or boolean values differ")
            else:
                # A baseline in float32, or an option of ours that gives precision away: 1e-3 of the largest value. Integers
                # and booleans must be equal.
                bound = 1e-3 * float(wanted.abs().max()) if wanted.is_floating_point() and wanted.numel() else 0.0
                assert_matches_truth(actual, wanted, reference, torch.float32, bound=bound, what=name)
        return worst


def gate(spec: OpSpec, case: Case) -> str:
    """`green`, or why ours has no figure here."""
    args, kwargs = cast(case.make(), torch.float32, _device())
    try:
        Gate(spec, case, case_mode(case)).check("ours", bind(spec, spec.public, args, kwargs, case_mode(case))())
    except AssertionError as error:
        return f"red: {error}"
    except Exception as error:  # the other cases are compared all the same
        return f"failed: {type(error).__name__}: {_first_line(error)}"
    return "green"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a CPU PyTorch says so only in the message of a RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _admit(gate: Gate, name: str, call: Callable) -> tuple[str, float]:
    """Why a baseline is not run for want of memory (empty where it runs and is right), and the seconds of the call."""
    start = time.perf_counter()
    try:
        results = call()
        _synchronize()
        seconds = time.perf_counter() - start
        gate.check(name, results)
    except Exception as error:
        if not out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"not run: out of memory: {_first_line(error)}", 0.0
    return "", seconds


def _admit_compiled(gate: Gate, name: str, call: Callable) -> tuple[str, float]:
    """Why a compiled baseline is not run (empty where it is), and the seconds of its first call."""
    try:
        why, seconds = _admit(gate, name, call)
        if not why:
            with torch._dynamo.config.patch(error_on_recompile=True):
                call()
    except AssertionError as error:
        return f"red: {error}", 0.0
    except torch._dynamo.exc.RecompileError as error:
        return f"not run: its guards fail, so that it would compile at every call: {_first_line(error)}", 0.0
    except Exception as error:  # whatever the compiler raises at code that it cannot take
        return f"not run: {type(error).__name__}: {_first_line(error)}", 0.0
    return why, seconds


def _empty(shared: dict, provider: str, gate: str) -> Row:
    figures = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "peak_mib", "ratio", "error_ratio"), float("nan"))
    none = dict.fromkeys(("gbps", "gflops", "roofline", "peak_gbps", "peak_gflops", "compile_s"))
    return Row(**shared, **figures, **none, provider=provider, runs=0, gate=gate)


def _shared(spec: OpSpec, case: Case, mode: str, sweep: tuple[str, float] | None) -> dict[str, Any]:
    """The columns that all rows of a case have in common."""
    return {
        "op": spec.name,
        "case": case.name,
        "mode": mode,
        "dtype": "float32",
        "target": None if torch.cuda.is_available() else case.target,  # promised on two cores
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "kernels": kernel_hash(spec.folder),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "clock_mhz": clock_mhz(),
        "sweep": sweep[0] if sweep else "",
        "size": sweep[1] if sweep else None,
    }


def _rates(spec: OpSpec, args: tuple, kwargs: dict, p50: float) -> dict[str, float | None]:
    """Bandwidth and rate of ours in a forward pass, and the share of what this machine allows."""
    moved = spec.bytes_moved(*args, **kwargs) if spec.bytes_moved else None
    flops = spec.flops(*args, **kwargs) if spec.flops else None
    if not moved and not flops:
        return {}
    bandwidth, rate = peaks()
    return {
        "gbps": moved / p50 / 1e6 if moved else None,
        "gflops": flops / p50 / 1e6 if flops else None,
        "roofline": max((moved or 0) / bandwidth, (flops or 0) / rate) / 1e6 / p50,
        "peak_gbps": bandwidth,
        "peak_gflops": rate,
    }


def _slow(name: str, call: float, seconds: float) -> str:
    """Why a baseline is not compiled that needs this many seconds for a call; empty where it is quick enough."""
    return (
        f"not run: one call of {name} needs {call:.3g} s, more than the case's {seconds:g} s (--seconds gives more)"
        if call > seconds
        else ""
    )


def _figures(calls: dict[str, Callable], seconds: float, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Times and memory of each provider; `shared` learns what others took of the machine meanwhile."""
    peaks_mib = {name: peak_memory(call)[0] / 2**20 for name, call in calls.items()}
    samples, shared["others"] = watched(lambda: alternate(calls, seconds))
    found = {}
    for name, times in samples.items():
        p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        found[name] = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "runs": len(times), "peak_mib": peaks_mib[name]}
    return {name: {**figures, "ratio": figures["p50_ms"] / found["ours"]["p50_ms"]} for name, figures in found.items()}


def measure(
    spec: OpSpec,
    case: Case,
    *,
    seconds: float = 5.0,
    backend: str | None = None,
    mode: str | None = None,
    compile: bool = False,
    without: dict[str, str] | None = None,
    sweep: tuple[str, float] | None = None,
) -> list[Row]:
    """One row per provider, ours first. Where the gate is red, one row that says so and holds no figure.

    Args:
        seconds: time for the case, shared by all providers. A baseline of which one call needs more is not compiled.
        mode: one of `MODES`; the case's own by default.
        compile: also `torch.compile` of the first baseline.
        without: providers that are not run, and why.
        sweep: variable and value, for the rows of a sweep.
    """
    mode = mode or case_mode(case)
    shared = _shared(spec, case, mode, sweep)
    args, kwargs = case.make()
    device = _device()
    plain = cast((args, {k: v for k, v in kwargs.items() if k != "exact"}), torch.float32, device)
    given = cast((args, kwargs), torch.float32, device)
    shared["backend"] = explain(spec.name, *given[0], **given[1], backend=backend).chosen
    calls = {"ours": bind(spec, lambda *a, **k: spec.public(*a, **k, backend=backend), *given, mode)}
    others = baselines(spec, case)
    left_out = {name: f"not run: {why}" for name, why in (without or {}).items()}
    first_call: dict[str, float] = {}
    try:
        gate = Gate(spec, case, mode)
        error_ratio = gate.check("ours", calls["ours"]())
        for name, function in others.items():
            if name not in left_out:
                call = bind(spec, function, *plain, mode)
                why, first_call[name] = _admit(gate, name, call)
                (left_out if why else calls)[name] = why or call
        first = next(iter(others))
        label = f"{first} compiled"
        if compile and first in calls and label not in left_out and getattr(others[first], "compiles", True):
            why = _slow(first, first_call[first], seconds)
            if not why:
                call = bind(spec, compiled(others[first]), *plain, mode)
                why, first_call[label] = _admit_compiled(gate, label, call)
            (left_out if why else calls)[label] = why or call
    except AssertionError as error:
        return [_empty(shared, "ours", f"red: {error}")]
    except Exception as error:  # ours or the reference; a baseline has said so itself
        if not out_of_memory(error):
            raise
        return [_empty(shared, "ours", f"not run: out of memory: {_first_line(error)}")]
    found = _figures(calls, seconds, shared)
    rows = []
    for name, figures in found.items():
        figures |= {"error_ratio": error_ratio, "compile_s": first_call[name] if name.endswith(" compiled") else None}
        figures |= _rates(spec, args, kwargs, figures["p50_ms"]) if name == "ours" and mode == "forward" else {}
        rows.append(dataclasses.replace(_empty(shared, name, "green"), **figures))
    return rows + [_empty(shared, name, why) for name, why in left_out.items()]

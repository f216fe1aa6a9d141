"""Measures one case: ours and the baselines in turn, after every one of them has been held to the right result."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _native
from .._spec import Case, OpSpec
from ..testing import assert_matches_truth, cast, flatten, gradient_tensors, peak_memory

MODES = ("forward", "forward+backward", "backward")
PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One provider on one case, as in the CSV. Times in milliseconds, memory in MiB above the inputs.

    Args:
        ratio: median of this provider / median of ours.
        error_ratio: error / allowed error of ours under the tolerance rule.
        gate: `green`; `red: …` and `not run: …` say why there is no figure.
        gbps, gflops: of ours in a forward pass, from the operator's own count of bytes and operations.
        roofline: time that this machine's measured bandwidth and product rate would need at least / median.
        sweep, size: the variable of a sweep and its value.
    """

    op: str
    case: str
    sweep: str
    size: float | None
    mode: str
    dtype: str
    provider: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int
    peak_mib: float
    ratio: float
    target: float | None
    error_ratio: float
    gate: str
    gbps: float | None
    gflops: float | None
    roofline: float | None
    machine: str
    threads: int
    clock_mhz: float | None
    torch: str
    commit: str
    kernels: str
    date: str


def machine() -> str:
    """The name of the GPU, or of the CPU with its instruction-set level."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).name
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    level = _native.extension.cpu_capability() if _native.extension is not None else "no kernels"
    return re.sub(r"\((R|TM)\)", "", f"{model}, {level}, {torch.get_num_threads()} threads")


@functools.cache
def commit() -> str:
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=PACKAGE, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else "installed"


def kernel_hash(folder: str, root: Path = PACKAGE.parent) -> str:
    """Of the sources of one operator's kernels, Triton and C++: equal as long as a figure still speaks of the same kernel.

    Without the C++ sources (an installed package) the compiled libraries stand for them.
    """
    sources = [p for p in (root / "wsss_kernels/ops" / folder).glob("*.py") if p.name not in ("spec.py", "__init__.py")]
    native = [*(root / "csrc/ops" / folder).glob("*"), *(root / "csrc/include").rglob("*")]
    native = [p for p in native if p.is_file()] or list((root / "wsss_kernels").glob("*.so"))
    digest = hashlib.sha256()
    for path in sorted([*sources, *native]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def clock_mhz() -> float | None:
    """Of the processor now: the mean over the CPU's cores, or the GPU's."""
    try:
        if torch.cuda.is_available():
            return float(torch.cuda.clock_rate())
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except (OSError, RuntimeError, ModuleNotFoundError):  # without the GPU's management library it is not known
        return None
    return round(sum(map(float, found)) / len(found), 1) if found else None


@functools.cache
def peaks() -> tuple[float, float]:
    """(GB/s of a copy that no cache holds, GFLOP/s of a float32 product) of this machine, measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 1 << (28 if device == "cuda" else 26)
    a, b = torch.ones(size, device=device), torch.empty(size, device=device)
    m = torch.rand(4096 if device == "cuda" else 1536, 4096 if device == "cuda" else 1536, device=device)
    times = alternate({"copy": lambda: b.copy_(a), "product": lambda: m @ m}, 1.0)
    best = {name: min(t) for name, t in times.items()}
    return 2 * a.numel() * 4 / best["copy"] / 1e6, 2 * m.shape[0] ** 3 / best["product"] / 1e6


def baselines(spec: OpSpec, case: Case) -> dict[str, Callable]:
    """The functions to compare with, the eager original first."""
    try:
        module = importlib.import_module(f"benchmarks.baselines.{spec.folder}")
    except ImportError:
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


def _call(spec: OpSpec, function: Callable, args: tuple, kwargs: dict, mode: str) -> Callable[[], list[torch.Tensor]]:
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return flatten(function(*args, **kwargs))

        return forward
    inputs = [t.requires_grad_() for t in gradient_tensors(spec, None, args, kwargs)]

    def gradients(results, **more):
        live = [t for t in results if t.requires_grad]
        return list(torch.autograd.grad(live, inputs, [_cotangent(t) for t in live], **more))

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


def alternate(calls: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, all run in turn until the time is spent; at least 3 runs each, quick calls more."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or min(map(len, times.values())) < 3:
        slowest = max((t[-1] for t in times.values() if t), default=0.0)
        for name, call in calls.items():
            spent = 0.0
            # as many runs of a quick call as fit into a fifth of the slowest one, so that its percentiles mean something
            while spent == 0.0 or (spent < slowest / 5 and len(times[name]) < 200):
                times[name].append(_milliseconds(call))
                spent += times[name][-1]
        if min(map(len, times.values())) >= 200:
            break
    return times


def _gate(spec: OpSpec, case: Case, calls: dict[str, Callable], mode: str) -> float:
    """The error ratio of ours; raises AssertionError where ours or a baseline gives another result."""
    args, kwargs = case.make()
    truth = _call(spec, spec.reference, *cast((args, _exact(kwargs)), torch.float64), mode)()
    coarse = _call(spec, spec.reference, *cast((args, _exact(kwargs)), torch.float32), mode)()
    worst = 0.0
    for name, call in calls.items():
        for actual, wanted, reference in zip(call(), truth, coarse, strict=True):
            if name == "ours" and "exact" not in kwargs:
                worst = max(worst, assert_matches_truth(actual, wanted, reference, torch.float32, gradient=mode != "forward"))
            elif wanted.is_floating_point():
                # a baseline in float32, or an option of ours that gives precision away: 1e-3 of the largest value
                bound = 1e-3 * float(wanted.abs().max()) if wanted.numel() else 0.0
                assert_matches_truth(actual, wanted, reference, torch.float32, bound=bound, what=name)
    return worst


def _exact(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k != "exact"}


def _empty(shared: dict, provider: str, gate: str) -> Row:
    nan = float("nan")
    figures = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "peak_mib", "ratio", "error_ratio"), nan)
    return Row(**shared, **figures, provider=provider, runs=0, gate=gate, gbps=None, gflops=None, roofline=None)


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
        seconds: time for the case, shared by all providers.
        mode: one of `MODES`; the case's own by default.
        compile: also `torch.compile` of the first baseline.
        without: providers that are not run, and why.
        sweep: variable and value, for the rows of a sweep.
    """
    mode = mode or ("forward+backward" if case.backward else "forward")
    shared = {"op": spec.name, "case": case.name, "mode": mode, "dtype": "float32", "target": case.target, "machine": machine()}
    shared |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(), "kernels": kernel_hash(spec.folder)}
    shared |= {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), "clock_mhz": clock_mhz()}
    shared |= {"sweep": sweep[0] if sweep else "", "size": sweep[1] if sweep else None}
    args, kwargs = case.make()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = cast((args, kwargs), torch.float32, device)
    plain = cast((args, _exact(kwargs)), torch.float32, device)
    others = {name: function for name, function in baselines(spec, case).items() if name not in (without or {})}
    left_out = [_empty(shared, name, f"not run: {why}") for name, why in (without or {}).items()]
    calls = {"ours": _call(spec, lambda *a, **k: spec.public(*a, **k, backend=backend), *given, mode)}
    calls |= {name: _call(spec, function, *plain, mode) for name, function in others.items()}
    try:
        error_ratio = _gate(spec, case, calls, mode)
        if compile and others:
            name, function = next(iter(others.items()))
            calls |= _compiled(spec, case, name, function, plain, mode, left_out, shared)
    except AssertionError as error:
        return [_empty(shared, "ours", f"red: {error}")]
    peaks_mib = {name: peak_memory(call)[0] / 2**20 for name, call in calls.items()}
    times = {name: torch.tensor(t) for name, t in alternate(calls, seconds).items()}
    ours = float(times["ours"].median())
    rows = []
    for name, t in times.items():
        p20, p50, p80 = (float(t.quantile(q)) for q in (0.2, 0.5, 0.8))
        moved = spec.bytes_moved(*args, **kwargs) if name == "ours" and mode == "forward" and spec.bytes_moved else None
        flops = spec.flops(*args, **kwargs) if name == "ours" and mode == "forward" and spec.flops else None
        rows.append(
            Row(
                **shared,
                provider=name,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                runs=len(t),
                peak_mib=peaks_mib[name],
                ratio=float(t.median()) / ours,
                error_ratio=error_ratio,
                gate="green",
                gbps=moved / p50 / 1e6 if moved else None,
                gflops=flops / p50 / 1e6 if flops else None,
                roofline=max((moved or 0) / peaks()[0], (flops or 0) / peaks()[1]) / 1e6 / p50 if moved or flops else None,
            )
        )
    return rows + left_out


def _compiled(
    spec: OpSpec, case: Case, name: str, function: Callable, plain: tuple, mode: str, left_out: list[Row], shared: dict
) -> dict[str, Callable]:
    """The compiled baseline if it compiles and agrees; otherwise a row that says why not."""
    label = f"{name} compiled"
    call = {label: _call(spec, compiled(function), *plain, mode)}
    try:
        _gate(spec, case, call, mode)
    except AssertionError as error:
        left_out.append(_empty(shared, label, f"red: {error}"))
    except Exception as error:  # whatever the compiler raises at code that it cannot take
        left_out.append(_empty(shared, label, f"not run: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"))
    else:
        return call
    return {}

"""`python -m wsss_kernels.bench`: what the operators gain on this machine.

Every case comes from an operator's spec. A figure is printed only where the result is right: ours is held to the
tolerance rule against the float64 reference, every baseline must agree with it too. Ours and the baselines run in turn,
so that both meet the same neighbours on a shared machine; medians with the 20th and 80th percentile are reported.

In a clone the baselines are those of `benchmarks/baselines` (the released algorithms in eager PyTorch); with an installed
package alone they are the operators' plain PyTorch references.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import importlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import _native, registry
from ._spec import Case, OpSpec
from .testing import assert_matches_truth, cast, flatten, gradient_tensors, peak_memory
from .tune import tune


@dataclass(frozen=True)
class Row:
    """One provider on one case, as in the CSV. Times in milliseconds, memory in MiB above the inputs."""

    op: str
    case: str
    mode: str
    dtype: str
    provider: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int
    peak_mib: float
    ratio: float  # median of this provider / median of ours
    target: float | None
    error_ratio: float  # error / allowed error of ours under the tolerance rule
    gate: str
    gbps: float | None
    gflops: float | None
    machine: str
    threads: int
    torch: str
    commit: str
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


def commit() -> str:
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else "installed"


def baselines(spec: OpSpec, case: Case) -> dict[str, Callable]:
    """The functions to compare with, the eager original first."""
    try:
        module = importlib.import_module(f"benchmarks.baselines.{spec.folder}")
    except ImportError:
        return {"reference": spec.reference}
    return {name: getattr(module, name) for name in case.baselines or spec.baselines} or {"reference": spec.reference}


@functools.cache
def _normal(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(7)).bfloat16()


def _cotangent(t: torch.Tensor) -> torch.Tensor:
    """Random, the same for every provider: under ones the gradient of a normalisation is 0 but for rounding."""
    return _normal(*t.shape).to(t)


def _call(spec: OpSpec, function: Callable, args: tuple, kwargs: dict, backward: bool) -> Callable[[], list[torch.Tensor]]:
    if not backward:

        def forward():
            with torch.no_grad():
                return flatten(function(*args, **kwargs))

        return forward
    inputs = [t.requires_grad_() for t in gradient_tensors(spec, None, args, kwargs)]

    def both():
        live = [t for t in flatten(function(*args, **kwargs)) if t.requires_grad]
        return list(torch.autograd.grad(live, inputs, [_cotangent(t) for t in live]))

    return both


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
                _synchronise()
                start = time.perf_counter()
                call()
                _synchronise()
                times[name].append(1e3 * (time.perf_counter() - start))
                spent += times[name][-1]
        if min(map(len, times.values())) >= 200:
            break
    return times


def _gate(spec: OpSpec, case: Case, calls: dict[str, Callable], backward: bool) -> float:
    """The error ratio of ours; raises AssertionError where ours or a baseline gives another result."""
    args, kwargs = case.make()
    truth = _call(spec, spec.reference, *cast((args, _exact(kwargs)), torch.float64), backward)()
    coarse = _call(spec, spec.reference, *cast((args, _exact(kwargs)), torch.float32), backward)()
    worst = 0.0
    for name, call in calls.items():
        for actual, wanted, reference in zip(call(), truth, coarse, strict=True):
            if name == "ours" and "exact" not in kwargs:
                worst = max(worst, assert_matches_truth(actual, wanted, reference, torch.float32, gradient=backward))
            elif wanted.is_floating_point():
                # a baseline in float32, or an option of ours that gives precision away: 1e-3 of the largest value
                bound = 1e-3 * float(wanted.abs().max()) if wanted.numel() else 0.0
                assert_matches_truth(actual, wanted, reference, torch.float32, bound=bound, what=name)
    return worst


def _exact(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k != "exact"}


def measure(spec: OpSpec, case: Case, *, seconds: float = 5.0, backend: str | None = None) -> list[Row]:
    """One row per provider, ours first. Where the gate is red, one row that says so and holds no figure."""
    mode = "forward+backward" if case.backward else "forward"
    shared = {"op": spec.name, "case": case.name, "mode": mode, "dtype": "float32", "target": case.target, "machine": machine()}
    shared |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}
    shared["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    args, kwargs = case.make()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = cast((args, kwargs), torch.float32, device)
    plain = cast((args, _exact(kwargs)), torch.float32, device)
    calls = {"ours": _call(spec, lambda *a, **k: spec.public(*a, **k, backend=backend), *given, case.backward)}
    calls |= {name: _call(spec, function, *plain, case.backward) for name, function in baselines(spec, case).items()}
    try:
        error_ratio = _gate(spec, case, calls, case.backward)
    except AssertionError as error:
        nan = float("nan")
        return [
            Row(
                **shared,
                provider="ours",
                p20_ms=nan,
                p50_ms=nan,
                p80_ms=nan,
                runs=0,
                peak_mib=nan,
                ratio=nan,
                error_ratio=nan,
                gate=f"red: {error}",
                gbps=None,
                gflops=None,
            )
        ]
    peaks = {name: peak_memory(call)[0] / 2**20 for name, call in calls.items()}
    times = {name: torch.tensor(t) for name, t in alternate(calls, seconds).items()}
    ours = float(times["ours"].median())
    rows = []
    for name, t in times.items():
        p20, p50, p80 = (float(t.quantile(q)) for q in (0.2, 0.5, 0.8))
        first = name == "ours" and not case.backward
        gbps = spec.bytes_moved(*args, **kwargs) / p50 / 1e6 if first and spec.bytes_moved else None
        gflops = spec.flops(*args, **kwargs) / p50 / 1e6 if first and spec.flops else None
        rows.append(
            Row(
                **shared,
                provider=name,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                runs=len(t),
                peak_mib=peaks[name],
                ratio=float(t.median()) / ours,
                error_ratio=error_ratio,
                gate="green",
                gbps=gbps,
                gflops=gflops,
            )
        )
    return rows


def append(rows: Iterable[Row], path: Path) -> None:
    """Adds rows to the machine's CSV; figures keep four significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def table(rows: list[Row]) -> str:
    """Rows of one case as text: ours, then each baseline with its ratio."""
    lines = []
    for row in rows:
        if row.gate != "green":
            lines.append(f"{row.op:<26} {row.case:<28} {row.mode:<17} {row.gate}")
            continue
        verdict = (
            ""
            if row.target is None or row.provider == "ours" or row.provider != rows[1].provider
            else f"  target {row.target:g}x {'reached' if row.ratio >= row.target else 'MISSED'}"
        )
        spread = f"{row.p50_ms:10.3f} ms [{row.p20_ms:.3f} to {row.p80_ms:.3f}]"
        lines.append(
            f"{row.op:<26} {row.case:<28} {row.mode:<17} {row.provider:<15} {spread:<38} {row.peak_mib:9.1f} MiB  {row.ratio:7.1f}x{verdict}"
        )
    return "\n".join(lines)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 if a gate is red; 2 for wrong use."""
    parser = argparse.ArgumentParser(prog="python -m wsss_kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", help="an operator's name; repeatable (default: all)")
    parser.add_argument("--case", help="only cases whose name contains this text")
    parser.add_argument("--all", action="store_true", help="also the long cases")
    parser.add_argument("--seconds", type=float, default=5.0, help="time per case, in seconds (default 5)")
    parser.add_argument("--backend", help="as in the operators")
    parser.add_argument(
        "--tune", action="store_true", help="find the fastest launch configurations of the Triton kernels for this GPU instead"
    )
    parser.add_argument("--csv", type=Path, help="append the rows to this file (a folder: <machine>.csv in it)")
    options = parser.parse_args(argv)
    try:
        chosen = [registry.spec(name) for name in options.op] if options.op else list(registry.specs())
    except ValueError as error:
        parser.error(str(error))
    work = [(spec, case) for spec in chosen for case in spec.cases if (case.quick or options.all) and (options.case or "") in case.name]
    if not work:
        parser.error("no case matches")
    if options.tune:
        try:
            print(f"written to {tune(work)}")
        except RuntimeError as error:
            parser.error(str(error))
        return 0
    print(
        f"{machine()}, PyTorch {torch.__version__}, {commit()}: medians [20th to 80th percentile], peak memory above the inputs, time relative to ours"
    )
    red = False
    for done, (spec, case) in enumerate(work, 1):
        if sys.stderr.isatty():
            print(f"[{done}/{len(work)}] {spec.name} {case.name}", end="\r", file=sys.stderr)
        rows = measure(spec, case, seconds=options.seconds, backend=options.backend)
        print(table(rows), flush=True)
        red |= any(row.gate != "green" for row in rows)
        if options.csv:
            append(rows, options.csv / f"{slug(machine())}.csv" if options.csv.is_dir() or not options.csv.suffix else options.csv)
    return int(red)


if __name__ == "__main__":
    sys.exit(main())

"""Sweeps over an operator's size: how time and memory grow, and where ours stops being faster."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .._spec import Case, OpSpec, Sweep
from .row import Row
from .timing import measure

_SHARE = 0.5  # of the free memory that a baseline may be expected to need


def free_bytes() -> float:
    """Memory that a call may use on the device that is measured."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    try:  # what is not used at all is little on a machine that has read files: the kernel gives their cache back
        found = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return 1024.0 * int(found.group(1))
    return (
        float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ())
        else math.inf
    )


def too_large(earlier: Sequence[Row], size: float, free: float) -> dict[str, str]:
    """Baselines whose memory, growing as between their last two sizes, would not be there; with the reason."""
    found = {}
    for name in {row.provider for row in earlier} - {"ours"}:
        rows = [row for row in earlier if row.provider == name]
        measured = [row for row in rows if row.gate == "green"]
        if rows and rows[-1].gate.startswith("not run: out of memory"):
            found[name] = "out of memory"
        elif len(measured) >= 2 and measured[-1].peak_mib > 0 and measured[-2].peak_mib > 0:
            a, b = measured[-2], measured[-1]
            power = math.log(b.peak_mib / a.peak_mib) / math.log((b.size or 1) / (a.size or 1))
            needed = b.peak_mib * (size / (b.size or 1)) ** max(power, 0) * 2**20
            if needed > _SHARE * free:
                found[name] = f"out of memory: it would need about {needed / 2**30:.3g} GiB"
    return found


def jobs(
    spec: OpSpec, sweep: Sweep, *, seconds: float, backend: str | None, compile: bool = False
) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """A name and a function that measures for each size, ascending; each function expects the smaller sizes to have been run."""
    earlier: list[Row] = []

    def one(size: float, case: Case) -> list[Row]:
        without, at = too_large(earlier, size, free_bytes()), (sweep.variable, float(size))
        rows = measure(spec, case, seconds=seconds, backend=backend, compile=compile, without=without, sweep=at)
        earlier.extend(rows)
        return rows

    for size, case in sorted(sweep.cases.items()):
        yield f"{spec.name} at {sweep.variable} = {size:g}", functools.partial(one, size, case)


def exponent(rows: Sequence[Row], provider: str = "ours") -> float | None:
    """p of time ∝ size^p by least squares on logarithms, over the upper half of the sizes, where fixed costs weigh less."""
    points = sorted((math.log(r.size), math.log(r.p50_ms)) for r in rows if r.provider == provider and r.gate == "green" and r.size)
    points = points[-max(2, (len(points) + 1) // 2) :]
    if len(points) < 2:
        return None
    x, y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    spread = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / spread if spread else None


def slower_at(rows: Sequence[Row]) -> list[float]:
    """Sizes at which some baseline is faster than ours."""
    return sorted({r.size for r in rows if r.provider != "ours" and r.gate == "green" and r.ratio < 1 and r.size is not None})

"""What is kept of a measurement: a line of the CSV."""

from __future__ import annotations

from dataclasses import dataclass

from .._spec import Case

MODES = ("forward", "forward+backward", "backward")


@dataclass(frozen=True)
class Row:
    """One provider on one case, as in the CSV. Times in milliseconds, memory in MiB above the inputs.

    Args:
        ratio: median of this provider / median of ours.
        error_ratio: error / allowed error of ours under the tolerance rule.
        gate: `green`; `red: …` and `not run: …` say why there is no figure.
        gbps, gflops: of ours in a forward pass, from the operator's own count of bytes and operations.
        roofline: time that this machine's measured bandwidth and product rate would need at least / median.
        peak_gbps, peak_gflops: those two measured rates.
        compile_s: the first call of a compiled baseline in seconds, which is where it compiles.
        sweep, size: the variable of a sweep and its value.
        others: share of all cores that other processes took meanwhile; beyond a few per cent the times are theirs as well.
        backend: the one of ours that was measured, in all rows of a case, as are `kernels` and `commit`; empty in older files.
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
    peak_gbps: float | None
    peak_gflops: float | None
    compile_s: float | None
    machine: str
    threads: int
    clock_mhz: float | None
    torch: str
    commit: str
    kernels: str
    date: str
    others: float | None = None
    backend: str = ""


def case_mode(case: Case) -> str:
    """The mode in which a case is measured unless another is asked for."""
    return "forward+backward" if case.backward else "forward"

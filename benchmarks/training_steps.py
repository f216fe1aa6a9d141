"""What `benchmarks/end_to_end.py` has measured, for the report of a machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

NOTE = (
    "<p>Medians, with a line from the 20th to the 80th percentile. Where the operators' share is 0 % both backends run the same code: "
    "by what they differ there is not the kernels' doing, and shows how much these figures can be trusted.</p>"
)


def read(folders: Sequence[Path]) -> list[tuple[str, dict]]:
    """(method and stage, what `benchmarks/end_to_end.py` measured) of every `.json` in the folders."""
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if {"fused", "reference"} <= set(record):
                found.append((f"{record['method']} {path.stem}" if "method" in record else path.stem, record))
    return found


def _percentiles(step: dict) -> list[float]:
    """[20th, 80th] in milliseconds, of the steps after the first two."""
    seconds = sorted(step.get("seconds", [])[2:])
    return [1000 * seconds[round(q * (len(seconds) - 1))] for q in (0.2, 0.8)] if seconds else []


def chart(pyplot, found: Sequence[tuple[str, dict]]):
    """A pair of bars per training stage with the 20th to 80th percentile; ours stacked, the operators' share and the rest."""
    if not found:
        return None
    figure, axis = pyplot.subplots(figsize=(8, 0.55 * len(found) + 1.2))
    for y, (_, record) in enumerate(found):
        for shift, backend in ((0.2, "reference"), (-0.2, "fused")):
            step = record[backend]
            operators = 1000 * step["median_seconds"] * step["operator_share"]
            rest = 1000 * step["median_seconds"] - operators
            axis.barh(
                y + shift, operators, 0.36, color="#0b6e4f", label="operators of wsss_kernels" if not y and backend == "fused" else None
            )
            # the profiler tells our operators from the rest, not the reference's
            colour, label = ("#bbbbbb", "everything else") if backend == "fused" else ("#8fa8c2", "whole step with the reference backend")
            axis.barh(y + shift, rest, 0.36, left=operators, color=colour, label=label if not y else None)
            share = f" (operators {100 * step['operator_share']:.2g} %)" if backend == "fused" else ""
            if low_high := _percentiles(step):
                axis.plot(low_high, [y + shift] * 2, color="black", linewidth=1)
            axis.text(
                max([operators + rest, *low_high]),
                y + shift,
                f" {backend}: {operators + rest:.4g} ms{share}, {step['peak_bytes'] / 2**20:.3g} MiB",
                va="center",
                fontsize=7,
            )
    axis.set_yticks(range(len(found)), [name for name, _ in found], fontsize=8)
    axis.set(xlabel="milliseconds of a training step")
    axis.margins(x=0.3)
    axis.legend(fontsize=7)
    return figure

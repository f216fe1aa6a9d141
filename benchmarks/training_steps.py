"""What `benchmarks/end_to_end.py` has measured, for the report of a machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

WARM_UP = 2  # steps that are not counted

NOTE = (
    "<p>Medians, with a line from the 20th to the 80th percentile. The operators' share, forward and backward, is that of one further step "
    "under the profiler. Where it is 0 % both backends run the same code: "
    "by what they differ there is not the kernels' doing, and shows how much these figures can be trusted.</p>"
)


_OPERATORS = {"fused": ("#0b6e4f", "operators of wsss_kernels"), "reference": ("#7fb8a4", "the same operators, reference backend")}
_REST = ("#bbbbbb", "everything else")
_WHOLE = ("#8fa8c2", "whole step, reference backend (operators not measured)")


def read(folders: Sequence[Path]) -> list[tuple[str, dict]]:
    """(method and stage, what `benchmarks/end_to_end.py` measured) of every `.json` in the folders.

    Raises:
        ValueError: a file is damaged.
    """
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{path}: is not a result of benchmarks/end_to_end.py ({error}); measure it again, or remove it"
                ) from error
            if isinstance(record, dict) and {"fused", "reference"} <= set(record):
                found.append((f"{record['method']} {path.stem}" if "method" in record else path.stem, record))
    return found


def _percentiles(step: dict) -> list[float]:
    """[20th, 80th] in milliseconds, of the steps after those to warm up."""
    seconds = sorted(step.get("seconds", [])[WARM_UP:])
    return [1000 * seconds[round(q * (len(seconds) - 1))] for q in (0.2, 0.8)] if seconds else []


def chart(pyplot, found: Sequence[tuple[str, dict]]):
    """A pair of bars per training stage with the 20th to 80th percentile, each stacked: the operators' share and the rest."""
    if not found:
        return None
    figure, axis = pyplot.subplots(figsize=(8, 0.55 * len(found) + 1.2))
    labels = set()
    for y, (_, record) in enumerate(found):
        for shift, backend in ((0.2, "reference"), (-0.2, "fused")):
            step = record[backend]
            operators = 1000 * step["median_seconds"] * step["operator_share"]
            rest = 1000 * step["median_seconds"] - operators
            known = step["operator_share"] > 0 or record["fused"]["operator_share"] == 0  # older files hold 0 for the reference
            share = f" (operators {100 * step['operator_share']:.2g} %)" if known else ""
            parts = [(0.0, operators, *_OPERATORS[backend]), (operators, rest, *(_REST if known else _WHOLE))]
            for left, width, colour, label in [part for part in parts if part[1] > 0]:
                axis.barh(y + shift, width, 0.36, left=left, color=colour, label=None if label in labels else label)
                labels.add(label)
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
    axis.margins(x=0.45)
    axis.legend(fontsize=7, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure

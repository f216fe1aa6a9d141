"""Rows as text and as CSV."""

from __future__ import annotations

import csv
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from .. import registry
from .row import Row

EAGER = ("eager", "reference")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def append(rows: Iterable[Row], path: Path) -> None:
    """Adds rows to the machine's CSV; what was measured keeps four significant digits, sizes keep all.

    Raises:
        ValueError: the file has other columns, is no CSV, or ends within a row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(Row)]
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV ({error}); name another file") from error
        if header != names:
            raise ValueError(f"{path} has the columns of another version; move it away, or name another file")
        if not path.read_bytes().endswith(b"\n"):
            raise ValueError(f"{path} ends within a row; remove its last line")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    k: f"{v:.15g}" if k == "size" and v is not None else f"{v:.4g}" if isinstance(v, float) else v
                    for k, v in asdict(row).items()
                }
            )


def read(path: Path) -> list[Row]:
    """The newest rows of every case and mode, in the order of the file.

    Raises:
        ValueError: a row is not complete, or holds something else.
    """
    hints = typing.get_type_hints(Row)
    newest: dict[tuple, list[Row]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            # what a file of an older version has no column for is not known
            names = [f.name for f in fields(Row) if f.default is MISSING or f.name in (reader.fieldnames or ())]
            for raw in reader:
                row = Row(**{name: _value(name, raw.get(name), hints[name]) for name in names})
                key = (row.op, row.case, row.mode, row.sweep)
                if row.provider == "ours":
                    newest.pop(key, None)
                newest.setdefault(key, []).append(row)
        except (csv.Error, ValueError) as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
    return [row for rows in newest.values() for row in rows]


def _value(name: str, text: str | None, kind: Any) -> Any:
    if text is None or (text == "" and kind in (int, float)):
        raise ValueError(f"no {name}")
    if kind is str:
        return text
    if text == "":
        return None
    return int(text) if kind is int else float(text)


def headline(rows: Sequence[Row]) -> tuple[Row, Row | None, Row | None]:
    """Of one case: ours, the best baseline, and the eager one. The baseline is `None` where none was run."""
    others = [row for row in rows if row.provider != "ours" and row.gate == "green"]
    eager = next((row for row in others if row.provider in EAGER), others[0] if others else None)
    return rows[0], min(others, key=lambda row: row.p50_ms, default=None), eager


def reached(rows: Sequence[Row]) -> tuple[str, bool] | None:
    """The baseline by which the case's target is defined, its first, and whether the target is reached; `None` if it has no figure."""
    spec = next((s for s in registry.specs() if s.name == rows[0].op), None)
    case = next((c for c in spec.cases if c.name == rows[0].case), None) if spec else None
    if spec is None or case is None or rows[0].target is None:
        return None
    first = (case.baselines or spec.baselines)[0]
    return next(((first, row.ratio >= rows[0].target) for row in rows if row.provider == first and row.gate == "green"), None)


def text(rows: list[Row]) -> str:
    """Rows of one case: ours, then each baseline with its ratio."""
    lines, judged = [], reached(rows)
    for row in rows:
        if row.gate != "green":
            lines.append(f"{row.op:<26} {row.case:<28} {row.mode:<17} {row.provider:<16} {row.gate}")
            continue
        verdict = f"  target {row.target:g}x {'reached' if judged[1] else 'MISSED'}" if judged and row.provider == judged[0] else ""
        spread = f"{row.p50_ms:10.3f} ms [{row.p20_ms:.3f} to {row.p80_ms:.3f}]"
        provider = f"ours ({row.backend})" if row.provider == "ours" and row.backend else row.provider
        lines.append(
            f"{row.op:<26} {row.case:<28} {row.mode:<17} {provider:<16} {spread:<38} {row.peak_mib:9.1f} MiB  {row.ratio:7.1f}x{verdict}"
        )
    if rows[0].others is not None and rows[0].others > 0.1:
        lines.append(f"{'':<26} disturbed: other processes took {100 * rows[0].others:.0f} % of the cores meanwhile")
    return "\n".join(lines)

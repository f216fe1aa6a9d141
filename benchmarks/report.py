"""Writes the operator table of the README: backends from the specs, ratios from `benchmarks/results/<machine>.csv`.

`python benchmarks/report.py --csv benchmarks/results/<machine>.csv` rewrites the table between its two markers, without `--csv`
with the ratios that stand there; `--check` says (exit code 1) whether the README lists the operators and backends that the specs hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wsss_kernels import registry  # noqa: E402  (the clone must come first on the path)
from wsss_kernels._spec import OpSpec  # noqa: E402
from wsss_kernels.bench import Row, case_mode, headline, read  # noqa: E402

BEGIN, END = "<!-- operators -->", "<!-- /operators -->"
DEVICES = {"cpu": "C++", "cuda": "CUDA", "triton": "Triton"}


def latest(path: Path) -> dict[tuple[str, str, str], list[Row]]:
    """The newest rows of every case and mode, ours first."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in read(path):
        if not row.sweep:
            found.setdefault((row.op, row.case, row.mode), []).append(row)
    return found


def _ratio(spec: OpSpec, measured: dict[tuple[str, str, str], list[Row]]) -> str:
    """The headline ratio, against the best baseline, and beside it the one against eager, of the first two cases."""
    cells = []
    for case in spec.cases:
        rows = measured.get((spec.name, case.name, case_mode(case)), [])
        if rows and rows[0].provider == "ours" and rows[0].gate == "green":
            _, best, eager = headline(rows)
            if best is not None:
                beside = f", {eager.ratio:.3g}× eager" if eager is not None and eager is not best else ""
                cells.append(
                    f"{best.ratio:.3g}× {best.provider}{beside} ({case.name.replace('_', ' ')}{', with backward' if case.backward else ''})"
                )
    return "; ".join(cells[:2])


def operator_table(measured: dict) -> str:
    """Markdown, one line per operator."""
    lines = ["| operator | CPU | GPU | gradient with respect to | measured: time of a baseline / time of ours |", "|---|---|---|---|---|"]
    for spec in registry.specs():
        gpu = ", ".join(DEVICES[b] for b in spec.backends if b != "cpu") or "reference"
        cpu = DEVICES["cpu"] if "cpu" in spec.backends else "reference"
        link = f"[`{spec.name}`](wsss_kernels/ops/{spec.folder}/README.md)"
        lines.append(f"| {link} | {cpu} | {gpu} | {', '.join(spec.gradients) or 'none'} | {_ratio(spec, measured)} |")
    return "\n".join(lines)


def _figures(table: str) -> dict[str, str]:
    """The last cell of each row by the first one, which names the operator."""
    rows = [line.split("|") for line in table.strip().splitlines()[2:]]
    return {row[1].strip(): row[-2].strip() for row in rows}


def _with_figures(table: str, figures: dict[str, str]) -> str:
    lines = table.splitlines()
    return "\n".join(lines[:2] + [f"{line.rsplit('|', 2)[0]}| {figures.get(line.split('|')[1].strip(), '')} |" for line in lines[2:]])


def _without_figures(table: str) -> list[str]:
    return [line.rsplit("|", 2)[0] for line in table.strip().splitlines()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, help="results of the machine that the README names (without: the ratios stay)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the table is out of date")
    options = parser.parse_args(argv)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    table, after = rest.split(END)
    if options.check:
        current = _without_figures(table) == _without_figures(operator_table({}))
        print(
            "the operator table is up to date" if current else "the operator table is out of date: run benchmarks/report.py",
            file=sys.stderr,
        )
        return int(not current)
    measured = {}
    if options.csv:
        try:
            measured = latest(options.csv)
        except (OSError, KeyError, ValueError, TypeError) as error:
            parser.error(f"{options.csv}: is not a CSV of `make bench` ({error})")
        if not measured:
            parser.error(f"{options.csv}: holds no rows")
    fresh = operator_table(measured) if options.csv else _with_figures(operator_table({}), _figures(table))
    readme.write_text(f"{before}{BEGIN}\n{fresh}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the operator table of the README: backends from the specs, ratios from `benchmarks/results/<machine>.csv`.

`python benchmarks/report.py --csv benchmarks/results/<cpu>.csv --gpu benchmarks/results/<gpu>.csv` rewrites the table between its two
markers, without a file with the ratios that stand there; `--check` says (exit code 1) whether the README lists the operators and backends that the specs hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
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


def _ratio(spec: OpSpec, measured: dict[tuple[str, str, str], list[Row]], which: Callable[[list[str]], list[str]]) -> str:
    """Headline ratios, against the best baseline, and beside each the one against eager, of some of the cases."""
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
    return "; ".join(which(cells))


def _link(spec: OpSpec) -> str:
    return f"[`{spec.name}`](wsss_kernels/ops/{spec.folder}/README.md)"


Figures = dict[str, str]  # a cell by the link of its operator


def cpu_figures(measured: dict) -> Figures:
    """The first two cases."""
    return {_link(spec): _ratio(spec, measured, lambda cells: cells[:2]) for spec in registry.specs()}


def gpu_figures(measured: dict) -> Figures:
    """The first case and the last, which is the largest."""
    return {_link(spec): _ratio(spec, measured, lambda cells: cells[:1] + cells[1:][-1:]) for spec in registry.specs()}


def operator_table(cpu: Figures, gpu: Figures) -> str:
    """Markdown, one line per operator."""
    lines = [
        "| operator | CPU | GPU | gradient with respect to | baseline / ours on a CPU | baseline / ours on a GPU |",
        "|---|---|---|---|---|---|",
    ]
    for spec in registry.specs():
        kernels = ", ".join(DEVICES[b] for b in spec.backends if b != "cpu") or "reference"
        on_cpu, name = DEVICES["cpu"] if "cpu" in spec.backends else "reference", _link(spec)
        gradients = ", ".join(spec.gradients) or "none"
        lines.append(f"| {name} | {on_cpu} | {kernels} | {gradients} | {cpu.get(name, '')} | {gpu.get(name, '')} |")
    return "\n".join(lines)


def _standing(table: str) -> tuple[Figures, Figures]:
    """The figures of a table."""
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()[2:]]
    return {row[1]: row[-3] for row in rows}, {row[1]: row[-2] for row in rows}


def _without_figures(table: str) -> list[str]:
    return [line.rsplit("|", 3)[0] for line in table.strip().splitlines()]


def _measured(parser: argparse.ArgumentParser, csv: Path) -> dict:
    try:
        found = latest(csv)
    except (OSError, KeyError, ValueError, TypeError) as error:
        parser.error(f"{csv}: is not a CSV of `make bench` ({error})")
    if not found:
        parser.error(f"{csv}: holds no rows")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, help="results of the CPU that the README names (without: the ratios stay)")
    parser.add_argument("--gpu", type=Path, metavar="CSV", help="results of the GPU that the README names (without: the ratios stay)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the table is out of date")
    options = parser.parse_args(argv)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    table, after = rest.split(END)
    cpu, gpu = _standing(table)
    if options.check:
        current = _without_figures(table) == _without_figures(operator_table(cpu, gpu))
        print(
            "the operator table is up to date" if current else "the operator table is out of date: run benchmarks/report.py",
            file=sys.stderr,
        )
        return int(not current)
    if options.csv:
        cpu = cpu_figures(_measured(parser, options.csv))
    if options.gpu:
        gpu = gpu_figures(_measured(parser, options.gpu))
    readme.write_text(f"{before}{BEGIN}\n{operator_table(cpu, gpu)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The report of one machine, from the rows in its CSV: `benchmarks/reports/<machine>.html`, and its pictures as PNG beside it.

    python benchmarks/machine_report.py benchmarks/results/<machine>.csv [--end-to-end RUN/end_to_end …] [--out FOLDER] [--images docs/images]

`--images` also writes `bench_time.png` and `bench_memory.png`, the sweeps of a few operators, for the README.

Self-contained: pictures are embedded, nothing is loaded from a network. A case whose gate is red shows its reason and no figure.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import training_steps  # noqa: E402  (the clone must come first on the path)
from wsss_kernels import registry  # noqa: E402
from wsss_kernels.bench import Row, exponent, headline, reached, read  # noqa: E402
from wsss_kernels.bench.sweep import slower_at  # noqa: E402

STEPS = ROOT / "benchmarks/results/end_to_end"  # a folder for each machine
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left } .red { color: #b00020; text-align: left }
img { max-width: 100% } .wide { overflow-x: auto }
"""
_VERDICT = {True: " reached", False: " <b class=red>missed</b>"}
_README = ("par", "affinity_random_walk", "supervised_contrastive_loss", "uncertainty_info_nce", "criss_cross_attention", "kmeans")


def groups(rows: Iterable[Row], *, sweep: bool) -> list[list[Row]]:
    """Rows of the cases, or of the sweeps in ascending size, sorted by operator and case."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if bool(row.sweep) == sweep:
            found.setdefault((row.op, row.sweep, row.mode) if sweep else (row.op, row.case, row.mode), []).append(row)
    return [sorted(found[key], key=lambda row: row.size or 0) for key in sorted(found)]


def _green(rows: Sequence[Row]) -> bool:
    return bool(rows) and rows[0].provider == "ours" and rows[0].gate == "green"


def _compared(rows: Iterable[Row]) -> bool:
    return any(row.provider != "ours" and row.gate == "green" for row in rows)


def _table(titles: Sequence[str], lines: Iterable[str]) -> str:
    """Lines are the `td` elements of a row."""
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f"<div class=wide><table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def _figure(value: float | None, unit: str = "") -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g}{unit}"


def ratio_table(cases: Sequence[list[Row]]) -> str:
    """One line per case: best baseline, eager, compiled, ours, memory, roofline, gate."""
    titles = [
        "operator",
        "case",
        "dtype",
        "mode",
        "eager ms",
        "compiled ms",
        "compile s",
        "best baseline",
        "ms",
        "ours p20 / p50 / p80 ms",
        "× best",
        "× eager",
    ]
    titles += [
        "target over the first baseline",
        "MiB ours",
        "MiB best",
        "GB/s",
        "GFLOP/s",
        "roofline",
        "error / allowed",
        "cores to others",
        "backend",
        "kernels",
        "commit",
    ]
    lines = []
    for rows in cases:
        name = "".join(f"<td>{html.escape(t)}</td>" for t in (rows[0].op, rows[0].case, rows[0].dtype, rows[0].mode))
        if not _green(rows):
            lines.append(f"{name}<td class=red colspan={len(titles) - 4}>{html.escape(rows[0].gate)}</td>")
            continue
        ours, best, eager = headline(rows)
        compiled = next((r for r in rows if r.provider.endswith("compiled")), None)
        cells = [
            _figure(eager.p50_ms) if eager else "",
            _figure(compiled.p50_ms) if compiled and compiled.gate == "green" else compiled.gate.partition(":")[0] if compiled else "",
            _figure(compiled.compile_s) if compiled else "",
            html.escape(best.provider) if best else "",
            _figure(best.p50_ms) if best else "",
            f"{ours.p20_ms:.3g} / {ours.p50_ms:.3g} / {ours.p80_ms:.3g}",
            _figure(best.ratio) if best else "",
            _figure(eager.ratio) if eager else "",
            _figure(ours.target) + _VERDICT[judged[1]] if (judged := reached(rows)) else _figure(ours.target),
            _figure(ours.peak_mib),
            _figure(best.peak_mib) if best else "",
            _figure(ours.gbps),
            _figure(ours.gflops),
            _figure(100 * ours.roofline, " %") if ours.roofline is not None else "",
            _figure(ours.error_ratio),
            _figure(100 * ours.others, " %") if ours.others is not None else "",
            html.escape(ours.backend),
            html.escape(ours.kernels),
            html.escape(ours.commit),
        ]
        lines.append(f"{name}{''.join(f'<td>{c}</td>' for c in cells)}")
    return _table(titles, lines)


def reasons(rows: Iterable[Row]) -> str:
    """One line per provider that gave no figure, with the reason."""
    without = [row for row in rows if row.gate != "green"]
    lines = ["".join(f"<td>{html.escape(t)}</td>" for t in (r.op, r.case, r.mode, r.provider, r.gate)) for r in without]
    return "<h2>What has no figure, and why</h2>" + _table(["operator", "case", "mode", "provider", "reason"], lines) if lines else ""


def not_measured(rows: Sequence[Row]) -> str:
    """A sentence that names the cases and sizes of the specs that have no row, so that nobody takes the report for whole."""
    found = {(r.op, r.case, r.sweep) for r in rows}
    lacking = {spec.name: [case.name for case in spec.cases if (spec.name, case.name, "") not in found] for spec in registry.specs()}
    for spec in registry.specs():
        for s in spec.sweeps:
            lacking[spec.name] += [
                f"{s.variable} = {size:g}" for size, case in s.cases.items() if (spec.name, case.name, s.variable) not in found
            ]
    parts = [f"{op} ({', '.join(names)})" if op in {r.op for r in rows} else op for op, names in lacking.items() if names]
    return f"<p>Not measured, as a time limit or a choice of operators left it out: {html.escape('; '.join(parts))}.</p>" if parts else ""


def sweep_table(sweeps: Sequence[list[Row]]) -> str:
    """Fitted beside expected exponents, and where a baseline is faster."""
    expected = {(spec.name, s.variable): s.exponent for spec in registry.specs() for s in spec.sweeps}
    titles = [
        "operator",
        "variable",
        "mode",
        "sizes",
        "expected exponent",
        "fitted, ours",
        "fitted, first baseline",
        "a baseline is faster at",
    ]
    lines = []
    for rows in sweeps:
        first = next((r.provider for r in rows if r.provider != "ours"), "")
        sizes = sorted({r.size for r in rows if r.size is not None})
        cells = [
            f"{sizes[0]:g} … {sizes[-1]:g}",
            _figure(expected.get((rows[0].op, rows[0].sweep))),
            _figure(exponent(rows)),
            _figure(exponent(rows, first)),
            ", ".join(f"{s:g}" for s in slower_at(rows)) or ("none of these" if _compared(rows) else "no baseline was run"),
        ]
        name = f"<td>{html.escape(rows[0].op)}</td><td>{html.escape(rows[0].sweep)}</td><td>{html.escape(rows[0].mode)}</td>"
        lines.append(f"{name}{''.join(f'<td>{c}</td>' for c in cells)}")
    return _table(titles, lines)


def _label(row: Row, *, mode: bool = False) -> str:
    """Operator and case; two cases may differ in the mode alone."""
    return f"{row.op} {row.case.replace('_', ' ')}{f' ({row.mode})' if mode and row.mode != 'forward' else ''}"


def _ratios(pyplot, cases: Sequence[list[Row]]):
    """A bar per case: time of the best baseline / ours."""
    found = sorted(
        ((best.ratio, _label(ours, mode=True), best.provider) for ours, best, _ in map(headline, cases) if best),
        key=lambda bar: bar[0],
    )
    if not found:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 0.24 * len(found) + 1.2))
    axis.barh(range(len(found)), [ratio for ratio, *_ in found], color=["#0b6e4f" if r >= 1 else "#b00020" for r, *_ in found])
    axis.set_yticks(range(len(found)), [label for _, label, _ in found])
    for y, (ratio, _, provider) in enumerate(found):
        axis.text(ratio, y, f" {ratio:.3g}× {provider}", va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="time of the best baseline / time of ours", xlim=(min(0.5, found[0][0] * 0.8), found[-1][0] * 4))
    axis.tick_params(axis="y", labelsize=7)
    axis.margins(y=0.01)
    return figure


def _curves(pyplot, sweeps: Sequence[list[Row]], what: str, columns: int = 4):
    """A panel per sweep: milliseconds or MiB over the size; a cross marks what memory did not allow."""
    if not sweeps:
        return None
    columns = min(columns, len(sweeps))
    lines = math.ceil(len(sweeps) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.4 * columns, 2.7 * lines), squeeze=False)
    for axis, rows in zip(axes.flat, sweeps, strict=False):
        for provider in dict.fromkeys(r.provider for r in rows):
            own = [r for r in rows if r.provider == provider]
            points = [(r.size, r.p50_ms if what == "time" else r.peak_mib) for r in own if r.gate == "green"]
            style = {"color": "#0b6e4f", "linewidth": 2} if provider == "ours" else {"linewidth": 1}
            points = [(x, y) for x, y in points if y > 0]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=provider, **style)
            missing = [r.size for r in own if r.gate.startswith("not run: out of memory")]
            if missing:
                top = max((y for _, y in points), default=1.0)
                axis.plot(missing, [top] * len(missing), "x", color="#b00020", label=f"{provider}: out of memory")
        axis.set(
            xscale="log", yscale="log", title=rows[0].op, xlabel=rows[0].sweep, ylabel="ms" if what == "time" else "MiB above the inputs"
        )
        axis.title.set_fontsize(9)
        sizes = sorted({r.size for r in rows if r.size is not None})
        axis.minorticks_off()
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(sweeps) :]:
        axis.set_visible(False)
    return figure


def peaks(rows: Iterable[Row]) -> tuple[float, float] | None:
    """The largest measured (GB/s of a copy, GFLOP/s of a product) of the rows."""
    found = [(row.peak_gbps, row.peak_gflops) for row in rows if row.peak_gbps and row.peak_gflops]
    return (max(b for b, _ in found), max(f for _, f in found)) if found else None


def _roofline(pyplot, cases: Sequence[list[Row]]):
    """The rate over the intensity under the measured roof, and the attained share of what binds, case by case."""
    found = sorted((rows[0] for rows in cases if rows[0].roofline), key=lambda row: row.roofline)
    roof = peaks(found)
    if roof is None:
        return None
    bandwidth, rate = roof
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, max(4.5, 0.24 * len(found) + 1)), width_ratios=(1, 1))
    points = [(n, row.gflops / row.gbps, row.gflops) for n, row in enumerate(found, 1) if row.gflops and row.gbps]
    ridge = rate / bandwidth
    x = [min([0.1, *(x / 2 for _, x, _ in points)]), ridge, max([10 * ridge, *(2 * x for _, x, _ in points)])]
    left.plot(x, [x[0] * bandwidth, rate, rate], color="black", linewidth=1, label=f"{bandwidth:.3g} GB/s, {rate:.3g} GFLOP/s, measured")
    left.plot([x for _, x, _ in points], [y for *_, y in points], "o", color="#35618f", markersize=4)
    for n, at, height in points:
        left.annotate(str(n), (at, height), textcoords="offset points", xytext=(3, 3), fontsize=7)
    left.set(xscale="log", yscale="log", xlabel="operations / byte, as the algorithm counts them", ylabel="GFLOP/s")
    left.legend(fontsize=7)
    right.barh(range(len(found)), [100 * row.roofline for row in found], color="#35618f")
    right.set_yticks(range(len(found)), [f"{_label(row)}  {n}" for n, row in enumerate(found, 1)])
    right.axvline(100, color="black", linewidth=0.8)
    right.set(xlabel="% of the roofline (above 100: the data lies in a cache)", xscale="log")
    right.tick_params(axis="y", labelsize=7)
    right.margins(y=0.01)
    return figure


def _embed(figure, path: Path) -> str:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def write_images(rows: Sequence[Row], folder: Path) -> None:
    """`bench_time.png` and `bench_memory.png`: the first sweep of each operator of `_README`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first: dict[str, list[Row]] = {}
    for spec in registry.specs():
        for found in groups(rows, sweep=True):
            if found[0].op == spec.name and found[0].sweep == spec.sweeps[0].variable and any(r.gate == "green" for r in found):
                first.setdefault(spec.name, found)
    chosen = [first[name] for name in _README if name in first]
    for what in ("time", "memory"):
        figure = _curves(pyplot, chosen, what, columns=3)
        if figure is not None:
            _embed(figure, folder / f"bench_{what}.png")
            pyplot.close(figure)


def write(rows: Sequence[Row], steps: Sequence[tuple[str, dict]], out: Path, name: str) -> Path:
    """The HTML file and its pictures; returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases, sweeps = groups(rows, sweep=False), groups(rows, sweep=True)
    green, swept = [c for c in cases if _green(c)], [s for s in sweeps if any(r.gate == "green" for r in s)]
    figures = {
        "ratios": _ratios(pyplot, green),
        "time": _curves(pyplot, swept, "time"),
        "memory": _curves(pyplot, swept, "memory"),
        "roofline": _roofline(pyplot, green),
        "end_to_end": training_steps.chart(pyplot, steps),
    }
    pictures = {key: _embed(figure, out / name / f"{key}.png") for key, figure in figures.items() if figure is not None}
    pyplot.close("all")
    first = rows[0]
    red, roof = [c for c in cases if not _green(c)], peaks(rows)
    facts = f"{first.machine}; PyTorch {first.torch}; {first.threads} threads; measured {min(r.date for r in rows)} to {max(r.date for r in rows)}"
    clocks = [r.clock_mhz for r in rows if r.clock_mhz]
    facts += f"; clocks {min(clocks):.0f} to {max(clocks):.0f} MHz" if clocks else ""
    parts = [
        f"<h1>wsss_kernels on {html.escape(first.machine)}</h1><p>{html.escape(facts)}.</p>",
        "<p>Ours and the baselines run in turn; times are medians with the 20th and 80th percentile, after a call to warm up; memory is the "
        "peak above the inputs: PyTorch's allocations and our workspaces, not what OpenCV or SciPy allocate themselves. A figure stands only where ours meets the tolerance rule against the float64 reference and every baseline "
        f"agrees with it: {len(green)} cases are green, {len(red)} red.</p>",
        "<h2>Time of the best baseline over ours</h2>",
        pictures.get("ratios", ""),
        ratio_table(cases),
        "<h2>Scaling</h2><p>time ∝ size<sup>p</sup>, fitted over the upper half of the sizes: below the "
        "expected exponent where fixed costs still weigh, above it where the data outgrows a cache."
        + ("</p>" if any(r.provider.endswith(" compiled") for s in sweeps for r in s) else " Baselines are not compiled here.</p>")
        if sweeps
        else "",
        sweep_table(sweeps) if sweeps else "",
        pictures.get("time", ""),
        "<h2>Memory over size</h2>" if sweeps else "",
        pictures.get("memory", ""),
        f"<h2>Roofline</h2><p>Bandwidth of a large copy, {roof[0]:.3g} GB/s, and rate of a float32 product, {roof[1]:.3g} GFLOP/s, both "
        "measured on this machine with the same threads; forward passes.</p>"
        if roof
        else "",
        pictures.get("roofline", ""),
        "<h2>Whole training steps</h2>" if steps else "",
        pictures.get("end_to_end", ""),
        training_steps.NOTE if steps else "",
        reasons(rows),
        not_measured(rows),
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.html"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>wsss_kernels benchmark</title><style>{_STYLE}</style>'
    path.write_text(head + "\n".join(part for part in parts if part) + "</html>\n", encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for wrong use."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("csv", type=Path, help="a file of `make bench`, or a folder: the newest one in it")
    parser.add_argument("--end-to-end", type=Path, nargs="*", metavar="FOLDER", help="default: benchmarks/results/end_to_end/<machine>")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/reports")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="also bench_time.png and bench_memory.png, for the README")
    options = parser.parse_args(argv)
    if options.csv.is_dir():
        options.csv = max(options.csv.glob("*.csv"), key=lambda p: p.stat().st_mtime, default=options.csv / "*.csv")
    try:
        rows = read(options.csv)
    except FileNotFoundError:
        parser.error(f"{options.csv}: there is no such file; `make bench` writes one")
    except OSError as error:
        parser.error(f"{options.csv}: cannot be read: {error}")
    except (KeyError, ValueError, TypeError) as error:
        parser.error(f"{options.csv}: is not a CSV of `make bench` ({error})")
    if not rows:
        parser.error(f"{options.csv}: holds no rows")
    if absent := [str(folder) for folder in options.end_to_end or () if not folder.is_dir()]:
        parser.error(f"--end-to-end: there is no folder {', '.join(absent)}")
    try:
        steps = training_steps.read([STEPS / options.csv.stem] if options.end_to_end is None else options.end_to_end)
    except ValueError as error:
        parser.error(str(error))
    try:
        path = write(rows, steps, options.out, options.csv.stem)
        if options.images:
            write_images(rows, options.images)
    except ImportError:
        parser.error("the pictures need matplotlib. Run: pip install matplotlib")
    except OSError as error:
        parser.error(f"the report cannot be written: {error}")
    print(f"written to {path} and {path.with_suffix('')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

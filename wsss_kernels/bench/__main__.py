"""The command `python -m wsss_kernels.bench`."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import bench, registry
from .._dispatch import BACKENDS
from .._spec import Case, OpSpec, Sweep
from ..tune import tune
from . import compare, sweep as sweeps
from .about import commit, machine
from .row import MODES, Row
from .table import append, slug, text
from .timing import gate, measure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wsss_kernels.bench", description=(bench.__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--op", action="append", help="an operator's name; repeatable (default: all)")
    parser.add_argument("--case", help="only cases whose name contains this text")
    parser.add_argument("--all", action="store_true", help="also the long cases")
    parser.add_argument("--mode", choices=MODES, help="instead of each case's own")
    parser.add_argument("--sweep", action="store_true", help="sweeps over each operator's size instead of the cases")
    parser.add_argument(
        "--compiled", action="store_true", help="also torch.compile of the first baseline (seconds to minutes a case or size)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time per case, in seconds (default 5)")
    parser.add_argument(
        "--minutes", type=float, help="time limit: no case, and no size of a sweep, is started after it, and what is left out is named"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="of ours, as in the operators")
    parser.add_argument(
        "--tune", action="store_true", help="find the fastest launch configurations of the Triton kernels for this GPU instead"
    )
    parser.add_argument("--compare", metavar="COMMIT", help="ours at another commit against ours here instead (in a clone)")
    parser.add_argument("--csv", type=Path, help="append the rows to this file (a folder: <machine>.csv in it)")
    return parser


def _progress(done: int, count: int, name: str) -> None:
    if sys.stderr.isatty():
        filled = round(20 * done / count)
        print(f"\r\033[K[{'#' * filled}{'.' * (20 - filled)}] {done}/{count} {name}", end="", file=sys.stderr, flush=True)


def _clear() -> None:
    """Takes the bar away, so that what is printed next does not stand behind it."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


Job = tuple[str, Callable[[], list[Row]]]


def _jobs(options: argparse.Namespace, work: list[tuple[OpSpec, Case]], swept: list[tuple[OpSpec, Sweep]]) -> list[Job]:
    """Names, and functions that measure one case or one size of a sweep."""
    more = {"seconds": options.seconds, "backend": options.backend, "compile": options.compiled}
    if options.sweep:
        return [job for spec, s in swept for job in sweeps.jobs(spec, s, **more)]
    return [(f"{spec.name} {case.name}", functools.partial(measure, spec, case, mode=options.mode, **more)) for spec, case in work]


INTERRUPTED = 130  # exit code

_WITHOUT = {  # options that would change nothing beside one that chooses what is done
    "tune": ("compare", "sweep", "mode", "compiled", "minutes", "backend", "csv"),
    "compare": ("sweep", "mode", "compiled", "minutes", "backend", "csv"),
    "sweep": ("case", "all", "mode"),
}


def _refuse_without_effect(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for chosen, useless in _WITHOUT.items():
        for name in useless:
            if getattr(options, chosen) and getattr(options, name):
                parser.error(f"--{name} has no effect beside --{chosen}")


def _csv(given: Path) -> Path:
    """The file to append to, which is there and takes rows.

    Raises:
        OSError: it cannot be written.
        ValueError: it holds something else.
    """
    path = given / f"{slug(machine())}.csv" if given.is_dir() or not (given.suffix or given.exists()) else given
    append([], path)
    return path


def _compare(commit: str, work: list[tuple[OpSpec, Case]], seconds: float) -> int:
    """Exit code 1 if a gate is red: such a case is not compared."""
    gates = [(spec.name, case.name, gate(spec, case)) for spec, case in work]
    red = [found for found in gates if found[2] != "green"]
    for name, case, why in red:
        print(f"{name:<26} {case:<28} {why}", flush=True)
    if len(red) < len(gates):
        print(compare.compare(commit, [(name, case) for name, case, why in gates if why == "green"], seconds=seconds))
    return int(bool(red))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 if a gate is red or a case failed; 2 for wrong use; 130 if interrupted."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not options.seconds > 0 or (options.minutes is not None and not options.minutes > 0):
        parser.error("--seconds and --minutes must be greater than 0")
    _refuse_without_effect(parser, options)
    try:
        chosen = [registry.spec(name) for name in dict.fromkeys(options.op)] if options.op else list(registry.specs())
    except ValueError as error:
        parser.error(str(error))
    cases = [(spec, case) for spec in chosen for case in spec.cases if (case.quick or options.all) and (options.case or "") in case.name]
    work = [(spec, case) for spec, case in cases if torch.cuda.is_available() or not case.gpu]
    # the first case of every operator, then the second ones, the long ones last: that is the order in which a time limit cuts
    work.sort(key=lambda found: (not found[1].quick, list(found[0].cases).index(found[1])))
    if options.mode and options.mode != "forward":
        work = [(spec, case) for spec, case in work if spec.gradients]
    swept = sorted(((spec, s) for spec in chosen for s in spec.sweeps), key=lambda found: found[0].sweeps.index(found[1]))
    if not (swept if options.sweep else work):
        parser.error("no case matches" + ("" if options.all else "; --all takes the long ones, too"))
    try:
        return _do(parser, options, work, swept)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _do(
    parser: argparse.ArgumentParser, options: argparse.Namespace, work: list[tuple[OpSpec, Case]], swept: list[tuple[OpSpec, Sweep]]
) -> int:
    """The exit code."""
    try:
        if options.tune:
            print(f"written to {tune(work)}")
            return 0
        if options.compare:
            return _compare(options.compare, work, options.seconds)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    try:
        csv = _csv(options.csv) if options.csv else None
    except (OSError, ValueError) as error:
        parser.error(f"--csv: {error}")
    print(
        f"{machine()}, PyTorch {torch.__version__}, {commit()}: medians [20th to 80th percentile], peak memory above the inputs, time relative to ours"
    )
    jobs, red, stop = _jobs(options, work, swept), False, time.monotonic() + 60 * (options.minutes or float("inf"))
    for done, (name, job) in enumerate(jobs):
        if time.monotonic() > stop:
            left = ", ".join(n for n, _ in jobs[done:])
            print(f"the limit of {options.minutes:g} minutes is reached; left out: {left}", file=sys.stderr)
            break
        _progress(done, len(jobs), name)
        try:
            rows = job()
        except KeyboardInterrupt:
            _clear()
            print(f"interrupted; left out: {', '.join(n for n, _ in jobs[done:])}", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:  # the other cases are measured all the same
            _clear()
            print(f"{name}: failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            red = True
            continue
        _clear()
        print(text(rows), flush=True)
        red |= any(row.gate.startswith("red") for row in rows)
        if csv:
            try:
                append(rows, csv)
            except (OSError, ValueError) as error:
                parser.error(f"--csv: {error}")
    return int(red)


if __name__ == "__main__":
    sys.exit(main())

"""`make bench`: cases with compiled baselines, then sweeps, rows appended to `benchmarks/results/<machine>.csv`; then the report.

Nine minutes for the cases, the long ones last, and six for the sweeps; what does not fit is named, and `--minutes` gives each more.
Options are those of `python -m wsss_kernels.bench`; with `--op`, `--case`, `--tune`, `--compare`, `--sweep`, `--mode` or `--csv` only that is done.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import machine_report  # noqa: E402  (the clone must come first on the path)
from wsss_kernels.bench import __main__ as bench, slug  # noqa: E402
from wsss_kernels.bench.about import machine  # noqa: E402

RESULTS = ROOT / "benchmarks/results"


def main(given: list[str]) -> int:
    """Exit code 1 if a gate is red."""
    words = {word.partition("=")[0] for word in given}
    if words & {"--op", "--case", "--tune", "--compare", "--sweep", "--csv", "--mode"}:
        return bench.main(given if words & {"--csv", "--tune", "--compare"} else ["--csv", str(RESULTS), *given])
    code = bench.main(["--csv", str(RESULTS), "--all", "--compiled", "--seconds", "2", "--minutes", "9", *given])
    if code == bench.INTERRUPTED:
        return code
    sweeping = [word for word in given if word not in ("--all", "--compiled")]  # the sweeps have all sizes; compiled they take longer
    code = max(code, bench.main(["--csv", str(RESULTS), "--sweep", "--seconds", "0.3", "--minutes", "6", *sweeping]))
    return max(code, machine_report.main([str(RESULTS / f"{slug(machine())}.csv")]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

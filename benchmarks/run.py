"""`make bench`: the operators against the baselines of this folder, rows appended to `benchmarks/results/<machine>.csv`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wsss_kernels.bench import __main__ as bench  # noqa: E402  (the clone must come first on the path)

if __name__ == "__main__":
    sys.exit(bench.main(["--csv", str(ROOT / "benchmarks/results"), *sys.argv[1:]]))

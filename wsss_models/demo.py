"""`python -m wsss_models.demo` (`make demo`): clicked points on real photographs → sharp masks, and what it cost.

The photographs are those that scikit-image ships. Nothing is downloaded and no network is run: the class activation
maps are made from the points below, the affinity from colour, texture and paths of the image.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from . import cli
from .errors import UsageError

POINTS = {
    "astronaut.png": {
        "person": [[230, 45], [228, 110], [80, 250], [230, 270], [130, 330], [120, 430], [200, 200], [330, 230], [30, 470]],
        "background": [[30, 150], [340, 100], [400, 260]],
    },
    "chelsea.png": {
        "cat": [[200, 60], [130, 120], [300, 150], [250, 240], [90, 220], [340, 30], [60, 280]],
        "background": [[420, 120], [15, 90]],
    },
    "coffee.png": {
        "coffee": [[270, 140], [340, 140], [300, 165]],
        "china": [[110, 190], [300, 340], [440, 170], [170, 300]],
        "background": [[60, 60], [520, 60], [560, 330], [30, 330]],
    },
    "ihc.png": {
        "gland": [[110, 120], [400, 90], [310, 410], [80, 420]],
        "stroma": [[220, 260], [450, 300], [200, 450]],
    },
}


def photographs() -> list[Path]:
    """The files of scikit-image, found without importing it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UsageError('the demo needs scikit-image and its photographs. Run: pip install "wsss_kernels[refine]"')
    found = [Path(spec.origin).parent / "data" / name for name in POINTS]
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise UsageError(f"this scikit-image has no {', '.join(missing)} in {found[0].parent}; install a released version of scikit-image")
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit codes as `wsss`."""
    parser = argparse.ArgumentParser(
        prog="python -m wsss_models.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="folder for the results (default demo_output)")
    out = parser.parse_args(argv).out
    try:
        images = photographs()
        out.mkdir(parents=True, exist_ok=True)
        listed = out / "points.json"
        listed.write_text(json.dumps(POINTS, indent=1) + "\n", encoding="utf-8")
    except (UsageError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    print(f"wsss refine {' '.join(path.name for path in images)} --points {listed} --out {out} --overwrite --compare", flush=True)
    code = cli.main(["refine", *map(str, images), "--points", str(listed), "--out", str(out), "--overwrite", "--compare"])
    if code == 0:
        print("\nLook at:")
        for path in images:
            print(f"  {(out / path.stem).resolve()}_before_after.png")
    return code


if __name__ == "__main__":
    sys.exit(main())

"""`wsss refine`: class activation maps or clicked points → masks, for one image or many."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from ..errors import UsageError
from . import settings as options

_NEEDED = {"PIL": "pillow", "skimage": "scikit-image", "scipy": "scipy", "tqdm": "tqdm"}
_MOST_THREADS = 4096
_EXAMPLES = """\
Give one of --cam, --point and --points.

examples:
  wsss refine cat.jpg --point cat:120,85 --point cat:200,140 --point background:20,20
  wsss refine cat.jpg --cam cat_cam.npy --features cat_features.npy --classes cat
  wsss refine JPEGImages --cam cams --features features --classes voc --out masks

For each image STEM the folder gets STEM.png (indexed: 0 background, then the classes), STEM_overlay.png,
STEM_before_after.png and STEM.json. What is there already, from the same inputs and parameters, is skipped.
Exit code: 0 all done, 1 some images failed (named on stderr), 2 wrong use, 130 interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file, or a folder of images")
    parser.add_argument(
        "--cam",
        type=Path,
        metavar="FILE",
        help="CAM of the image: .npy (K×h×w in 0…1) or .npz (cam and, if wanted, classes); or a folder that holds STEM.npy or STEM.npz for each image",
    )
    parser.add_argument(
        "--point",
        action="append",
        metavar="CLASS:X,Y",
        help="a point of a class, in pixels from the top left; repeatable; the class is a name or the pixel value of the mask; background says where no object is",
    )
    parser.add_argument("--points", type=Path, metavar="FILE.json", help='points of many images: {"IMAGE": {"CLASS": [[X, Y], …]}}')
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="feature maps for the affinity: .npy or .npz, C×h×w or L×C×h×w; or a folder as for --cam (without: colour, texture and paths of the image)",
    )
    parser.add_argument("--classes", metavar="A,B,…", help="names of the pixel values 1, 2, …; voc stands for Pascal VOC's 20")
    parser.add_argument("--out", type=Path, default=Path("refined"), metavar="DIR", help="folder for the results (default refined)")
    parser.add_argument("--overwrite", action="store_true", help="also what is done already")
    parser.add_argument("--no-pictures", action="store_true", help="only the mask and its record, no overlay and no before/after")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also run the released algorithms in eager PyTorch on these images, and print time, memory and agreement",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto takes a GPU if there is one (default auto)")
    machine.add_argument("--backend", choices=("reference", "cpu", "triton", "cuda"), help="of the operators (default: chosen by device)")
    machine.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice); the result does not depend on it"
    )
    options.add_arguments(parser)


def check_packages() -> None:
    """Raises `UsageError` naming what is not installed."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f'these packages are not installed: {", ".join(missing)}. Run: pip install "wsss_kernels[refine]"')


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 if an image failed."""
    settings = options.from_arguments(args)
    if args.threads is not None and not 1 <= args.threads <= _MOST_THREADS:
        raise UsageError(f"--threads must be between 1 and {_MOST_THREADS}, got {args.threads}")
    if args.features is None and args.first_layer > 1:
        raise UsageError(f"--first-layer must be 0 or 1 without --features, which has two layers then, got {args.first_layer}")
    check_packages()
    from . import interrupts, jobs, outputs, runner

    planned, classes = jobs.plan(args, args.out)
    if args.compare:
        from . import compare

        compare.eager_operators()  # refuses now, not after the work, if they are not there
    outputs.prepare_folder(args.out)
    with interrupts.told(), runner.machine(args.device, args.backend, args.threads) as device:
        summary = runner.run(planned, classes, settings, args.out, device, overwrite=args.overwrite, pictures=not args.no_pictures)
        print(summary, flush=True)
        if args.compare and summary.refinable:
            try:
                print(compare.compare(summary.refinable, classes, settings, device), flush=True)
            except (RuntimeError, MemoryError) as error:
                raise UsageError(f"--compare: the released algorithms cannot run here: {error}") from None
    return 1 if summary.failed or summary.stopped else 0

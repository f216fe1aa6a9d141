"""`wsss run METHOD` and its single steps: `precompute`, `train`, `pseudo-label`, `segment`, `predict`, `evaluate`."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError
from ..refine.outputs import OutputError

_NEEDED = {"accelerate": "accelerate", "yaml": "pyyaml", "tqdm": "tqdm", "PIL": "pillow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command = parser.prog.split()[-1]
    parser.set_defaults(step=command)
    parser.add_argument(
        "method", metavar="METHOD", help="unicl_affseg, gland, oct_multimodal, dusss or cldf; or a module that has a METHOD"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML, such as configs/gland_small.yaml (shipped); without: the run's, or the paper's values",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one value of the configuration; repeatable; dotted for groups"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set (default: the run's)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="RUN", help="folder of the run; what is done there already is not done again"
    )
    parser.add_argument("--stage", metavar="NAME", help="only this stage")
    parser.add_argument("--overwrite", action="store_true", help="start the stages again instead of continuing them")
    parser.add_argument("--resume", action="store_true", help="continue (also the default): say so if there is nothing to continue")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read, and count them")
    if command == "predict":
        parser.add_argument("--images", type=Path, metavar="PATH", help="an image or a folder of images, in place of the data set's")
        parser.add_argument("--to", type=Path, metavar="DIR", help="folder for the masks of --images (default RUN/images)")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if an input cannot be read or an output cannot be written."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f'these packages are not installed: {", ".join(missing)}. Run: pip install "wsss_kernels[models]"')
    try:
        return _run(args)
    except (InputError, OutputError) as error:
        print(f"wsss {args.step}: error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"wsss {args.step}: error: the disk is full; the same command goes on when there is room", file=sys.stderr)
    return 1


def _configuration(args: argparse.Namespace, method: Any) -> tuple[Any, Path]:
    """The configuration and the data folder: what the call says, else what the run was made with."""
    from . import config as configs, run as runs

    before = runs.saved(args.out) if not args.overwrite or args.step != "run" else None
    overrides = [*args.set, *(["skip_bad=true"] if args.skip_bad else [])]
    if args.config is None and before is not None:
        base = configs.record(configs.from_record(method.config, before["config"]))
        config = configs.from_record(method.config, configs.overlay(base, overrides))
    else:
        config = configs.load(method.config, args.config, overrides)
    if args.resume and before is None:
        raise UsageError(f"--resume: {args.out} holds no run")
    if args.data is None and before is None:
        raise UsageError("--data: the folder of the data set is needed")
    return config, args.data if args.data is not None else Path(before["data"])


def _run(args: argparse.Namespace) -> int:
    from . import run as runs
    from .method import find

    method = find(args.method)
    config, data = _configuration(args, method)
    if args.overwrite and args.step == "run":
        (args.out / "config.yaml").unlink(missing_ok=True)
    context = runs.open_run(method, config, data, args.out)
    try:
        if args.step == "predict" and args.images is not None:
            from .predict import predict_images

            return predict_images(method, context, args.images, args.to or args.out / "images", overwrite=args.overwrite)
        stages = method.stages(config)
        chosen = runs.choose(stages, args.out, None if args.step == "run" else args.step, args.stage)
        runs.run_stages(method, context, chosen, overwrite=args.overwrite)
        if context.main:
            print(f"results in {args.out}")
    finally:
        if context.processes > 1 and sys.exc_info()[0] is None:
            context.accelerator.end_training()
    return 0

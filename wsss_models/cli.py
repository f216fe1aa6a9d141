"""The command `wsss`. A further command is a module with `add_arguments(parser)` and `run(args) -> exit code`, and a line here."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .errors import UsageError

_METHODS = "wsss_models.engine.command"
COMMANDS = {
    "refine": ("wsss_models.refine.command", "turns class activation maps, or clicked points, into sharp masks"),
    "run": (_METHODS, "runs all stages of a method, from images to metrics, and continues where an earlier run stopped"),
    "precompute": (_METHODS, "runs the stages of a method that prepare inputs on disk"),
    "train": (_METHODS, "trains the weakly supervised model of a method"),
    "pseudo-label": (_METHODS, "writes the pseudo-labels of the training images"),
    "segment": (_METHODS, "trains the segmentation network of a method on its pseudo-labels"),
    "predict": (_METHODS, "writes the predicted masks of the test images, or of any images"),
    "evaluate": (_METHODS, "compares masks with the truth: figures, tables and a sheet of pictures"),
    "info": ("wsss_models.engine.about", "says what is installed, what is missing and why"),
}
"""name: (module, summary). A module is imported only when its command runs, so that `wsss --help` needs no PyTorch."""


def _version() -> str:
    try:
        return version("wsss_kernels")
    except PackageNotFoundError:
        return "unknown (not installed)"


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the chosen command's arguments are filled in."""
    top = argparse.ArgumentParser(
        prog="wsss", description="Weakly supervised semantic segmentation. `wsss COMMAND --help` explains a command."
    )
    top.add_argument("--version", action="version", version=f"wsss_kernels {_version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False)
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all done, 1 some inputs failed (named on stderr), 2 wrong use, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names and our words may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    try:
        args = parser(chosen).parse_args(arguments)
        return importlib.import_module(COMMANDS[args.command][0]).run(args)
    except UsageError as error:
        print(f"wsss {chosen}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nwsss: interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (`| head`) has left; nothing more can be said
        _mute()
        return 1
    except OSError as error:
        print(f"wsss {chosen}: error: {error}", file=sys.stderr)
        if error.errno == errno.ENOSPC and error.filename is None:  # standard output itself may be what is full
            _mute()
        return 1


def _mute() -> None:
    """Lets the interpreter end although standard output takes nothing more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())

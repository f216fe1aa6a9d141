"""`wsss predict METHOD --out RUN --images PATH`: masks of any images by a trained run."""

from __future__ import annotations

import contextlib
from pathlib import Path

import wsss_kernels

from ..errors import UsageError
from ..refine.images import SUFFIXES, read_image
from ..refine.outputs import prepare_folder
from .context import Context
from .method import Method
from .writing import Writing, png


def predict_images(method: Method, context: Context, images: Path, to: Path, *, overwrite: bool = False) -> int:
    """Writes NAME.png for every image; those that are there already are kept, unless `overwrite`. Exit code 1 if some could not be read (`skip_bad`).

    Raises:
        UsageError: the method takes no photographs, or there are no images.
    """
    if method.predictor is None:
        raise UsageError(f"--images: {method.name} does not take single images; use `wsss predict` with its data set")
    files = sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES) if images.is_dir() else [images]
    if not files:
        raise UsageError(f"--images {images}: the folder holds no image")
    names = {(f.relative_to(images) if images.is_dir() else Path(f.name)).with_suffix("").as_posix(): f for f in files}
    prepare_folder(to)
    if overwrite:
        for name in context.shard(list(names)):
            (to / f"{name}.png").unlink(missing_ok=True)
    context.stage = "predict"
    with contextlib.nullcontext() if context.config.kernels else wsss_kernels.use_backend("reference"):
        predictor = method.predictor(context)
        job = Writing(list(names), lambda name: [f"{name}.png"], lambda name: [png(predictor(read_image(names[name])))], to)
        found = job.run(context)
    if context.main:
        print(f"{found['written']} of {found['items']} written to {to}")
    for name, why in context.bad.items():
        print(f"{name}: {why}")
    return 1 if context.bad else 0

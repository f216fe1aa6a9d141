"""Runs the jobs: reads, refines and writes image by image, reports what fails and goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import wsss_kernels

from ..errors import InputError, UsageError
from . import arrays, images, outputs, pictures, points, tokens
from .classes import ClassTable
from .jobs import Job
from .pipeline import Operators, Refined, Stopwatch, check_grid, refine, working_image
from .settings import Settings


@dataclass
class Inputs:
    """What the pipeline takes, read from the files of a job."""

    image: np.ndarray
    cam: np.ndarray
    features: np.ndarray
    values: list[int]
    milliseconds: dict[str, float]

    @property
    def size(self) -> int:
        """Numbers in image, maps and features."""
        return self.image.size + self.cam.size + self.features.size


@dataclass
class Summary:
    """What became of the jobs."""

    folder: Path
    done: list[Job] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)
    stopped: bool = False

    @property
    def refinable(self) -> list[Job]:
        return self.done + self.skipped

    def __str__(self) -> str:
        parts = [f"{len(self.done)} refined"]
        parts += [f"{len(self.skipped)} done before"] if self.skipped else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        return f"{', '.join(parts)}. Results in {self.folder}"


@contextlib.contextmanager
def machine(device: str, backend: str | None, threads: int | None) -> Iterator[torch.device]:
    """The device, with threads and backend set meanwhile.

    Raises:
        UsageError: a device or backend that is not there.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        found = torch.device(chosen)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {device}: expected cpu or a CUDA device that is there, got: {str(error).splitlines()[0]}") from None
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: expected cpu or cuda")
    with contextlib.nullcontext() if backend is None else wsss_kernels.use_backend(backend):
        if backend is not None:
            _try_backend(found, backend)
        yield found


def _try_backend(device: torch.device, backend: str) -> None:
    """Runs the pipeline on one token, so that a backend that cannot run says so before any image is read."""
    try:
        refine(np.zeros((2, 2, 3), np.uint8), np.ones((1, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32), device=device)
    except wsss_kernels.BackendUnavailable as error:
        raise UsageError(f"--backend {backend}: {error}") from None


def identity(job: Job, settings: Settings, classes: ClassTable) -> dict[str, Any]:
    """Checksums of the inputs and all parameters: equal if and only if the result is."""
    sums = {}
    for kind, path in (("image", job.image), ("--cam", job.cam), ("--features", job.features)):
        try:
            if path is not None:
                sums[kind.lstrip("-")] = outputs.checksum(path)
        except FileNotFoundError:
            raise InputError(f"{kind} {path}: there is no such file") from None
        except OSError as error:
            raise InputError(f"{kind} {path}: cannot be read ({error.strerror})") from None
    if job.points:
        sums["points"] = hashlib.sha256(json.dumps([(p.name, p.x, p.y) for p in job.points]).encode()).hexdigest()
    return {"sha256": sums, "classes": classes.numbers(p.name for p in job.points), "parameters": settings.record()}


def read_inputs(job: Job, settings: Settings, classes: ClassTable, *, several: bool) -> Inputs:
    """Reads and checks everything that one image needs.

    Raises:
        InputError: naming the argument, what was expected and what came.
    """
    watch = Stopwatch(torch.device("cpu"))
    with watch("read"):
        image = images.read_image(job.image)
        height, width = image.shape[:2]
        features = arrays.read_features(job.features) if job.features is not None else None
        cam_file = arrays.read_cam(job.cam) if job.cam is not None else None
    if cam_file is not None:
        check_grid(f"--cam {job.cam}", cam_file.cam.shape[-2:], (height, width))
    if features is not None:
        check_grid(f"--features {job.features}", features.shape[-2:], (height, width))
    if cam_file is None and not any(p.name != points.BACKGROUND for p in job.points):
        raise InputError(f"image {job.image}: expected a CAM or at least one point of an object, got none")
    points.check_inside(job.points, height, width)
    with watch("features"):
        if features is None or cam_file is None:
            seen = working_image(image, settings.max_side)
            grid = tokens.token_grid(seen, *(tokens.grid_size(*seen.shape[:2], settings) if features is None else features.shape[-2:]))
        if features is None:
            features = tokens.features(grid, settings)
    with watch("cam"):
        if cam_file is not None:
            cam, values = cam_file.cam, classes.of_maps(cam_file.classes, len(cam_file.cam), several)
        else:
            names = list(dict.fromkeys(p.name for p in job.points))
            cam, values = points.point_cam(job.points, names, grid, height, width, settings), [classes.value[name] for name in names]
    return Inputs(image, cam, features, values, watch.milliseconds)


def _save(job: Job, inputs: Inputs, result: Refined, classes: ClassTable) -> dict[str, Any]:
    names = {value: classes.name(value) for value in {*inputs.values, *result.values}}
    return {
        "mask": lambda file: pictures.mask_image(result.label).save(file, "PNG"),
        "overlay": lambda file: pictures.overlay(inputs.image, result.label).save(file, "PNG"),
        "before_after": lambda file: pictures.before_after(
            inputs.image, result.before, result.after, result.label, result.values, names, job.points, classes.value
        ).save(file, "PNG"),
    }


def versions() -> dict[str, str]:
    import PIL
    import scipy
    import skimage

    found = {"wsss_kernels": wsss_kernels.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return {
        **found,
        "pillow": PIL.__version__,
        "scipy": scipy.__version__,
        "scikit-image": skimage.__version__,
        "python": platform.python_version(),
    }


def _record(job: Job, inputs: Inputs, result: Refined, key: dict[str, Any], classes: ClassTable, device: torch.device) -> dict[str, Any]:
    times = {**inputs.milliseconds, **result.milliseconds}
    found, counts = np.unique(result.label, return_counts=True)
    return {
        "format": outputs.FORMAT,
        "image": str(job.image),
        "size": {"width": inputs.image.shape[1], "height": inputs.image.shape[0]},
        "cam": str(job.cam) if job.cam is not None else "from points",
        "points": [str(p) for p in job.points],
        "features": str(job.features) if job.features is not None else "colour, texture and paths of the image",
        "grid": {
            "layers": inputs.features.shape[0],
            "channels": inputs.features.shape[1],
            "h": inputs.features.shape[2],
            "w": inputs.features.shape[3],
        },
        "classes": {str(value): classes.name(value) for value in sorted({0, *inputs.values})},
        "pixels": {str(int(value)): int(count) for value, count in zip(found, counts, strict=True)},
        "milliseconds": {**times, "total": round(sum(times.values()), 3)},
        "device": str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        "threads": torch.get_num_threads(),
        "backends": backends(device),
        "versions": versions(),
        "inputs": key,
    }


def backends(device: torch.device) -> dict[str, str]:
    """Which implementation of each operator runs."""
    cam = torch.zeros(1, 1, 1, 1, device=device)
    calls = {"box_mask": (cam,), "affinity_random_walk": (cam, None, cam), "par": (cam, cam)}
    return {name: wsss_kernels.explain(name, *arguments).chosen for name, arguments in calls.items()}


def run_job(
    job: Job, settings: Settings, classes: ClassTable, folder: Path, device: torch.device, *, overwrite: bool, pictures: bool, several: bool
) -> bool:
    """True if the image was refined, False if it had been before."""
    files = outputs.paths(folder, job.stem, pictures)
    key = identity(job, settings, classes)
    if not overwrite and outputs.is_done(files, key):
        return False
    inputs = read_inputs(job, settings, classes, several=several)
    result = refine(inputs.image, inputs.cam, inputs.features, inputs.values, settings, device=device, operators=Operators.compiled())
    outputs.write(files, _save(job, inputs, result, classes), _record(job, inputs, result, key, classes, device))
    return True


def run(
    jobs: Sequence[Job], classes: ClassTable, settings: Settings, folder: Path, device: torch.device, *, overwrite: bool, pictures: bool
) -> Summary:
    """Runs all jobs. One that fails is named on stderr and the others are done; a full disk ends the run.

    Raises:
        KeyboardInterrupt: with a message that says how far the run came.
    """
    summary = Summary(folder)
    with tqdm(jobs, unit="image", disable=None if len(jobs) > 1 else True) as bar:
        for job in bar:
            try:
                new = run_job(job, settings, classes, folder, device, overwrite=overwrite, pictures=pictures, several=len(jobs) > 1)
                (summary.done if new else summary.skipped).append(job)
            except InputError as error:
                summary.failed.append(job)
                bar.write(f"wsss refine: {job.stem}: {error}", file=sys.stderr)
            except (MemoryError, RuntimeError, ValueError) as error:
                summary.failed.append(job)
                bar.write(f"wsss refine: {job.stem}: {type(error).__name__}: {error}", file=sys.stderr)
            except outputs.OutputError as error:
                rest = len(jobs) - len(summary.refinable) - len(summary.failed)
                left = f"{rest} images are not done" if rest != 1 else "1 image is not done"
                bar.write(f"wsss refine: error: {error}; {left}. Run the same command again to go on", file=sys.stderr)
                summary.stopped = True
                break
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"{len(summary.refinable)} of {len(jobs)} images are done. Run the same command again to go on"
                ) from None
    return summary

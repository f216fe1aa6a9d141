"""`wsss refine --compare`: time, memory and agreement of the operators against the released algorithms in eager PyTorch.

The eager side is `benchmarks/baselines` of the source tree, the same code that `make bench` measures.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UsageError
from . import runner
from .classes import ClassTable
from .jobs import Job
from .pipeline import Operators, refine
from .settings import Settings

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("box_mask", "affinity_random_walk", "par")
_RUNS, _BUDGET = 3, 4.0  # runs of each side, and seconds after which an image is not repeated again
_PATIENCE = 60.0  # seconds after which no further image is compared


def _baseline(name: str) -> object:
    if not (ROOT / "benchmarks" / "baselines" / f"{name}.py").is_file():
        raise UsageError(
            "--compare: expected the source tree, whose benchmarks/baselines hold the released algorithms; this is an installed package"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"benchmarks.baselines.{name}")


def eager_operators() -> Operators:
    """The released algorithms, with the signatures of ours."""
    affinity, walk, released_par = _baseline("affinity"), _baseline("random_walk"), _baseline("par")

    def affinity_random_walk(
        cam: Tensor, decoder: None, encoder: Tensor, mask: Tensor, *, first_layer: int, clamp_min: float, **options
    ) -> Tensor:
        layers = affinity.eager_cosine(encoder[:, first_layer:], clamp_min=clamp_min)
        return walk.eager(layers.mean(dim=1), cam, mask, **options)

    def par(
        image: Tensor, mask: Tensor, dilations: Sequence[int], num_iter: int, *, w1: float, w2: float, w3: float, exact: bool
    ) -> Tensor:
        if (w1, w2, w3) != (0.3, 0.3, 0.01):
            raise UsageError(f"--compare: the released PAR has w1 = w2 = 0.3 and w3 = 0.01, got {w1}, {w2}, {w3}")
        return released_par.eager(image, mask, dilations, num_iter)

    return Operators(_eager_box_mask(), affinity_random_walk, par)


def _eager_box_mask() -> Callable[..., Tensor]:
    if importlib.util.find_spec("cv2") is None:
        from wsss_kernels import box_mask

        return lambda cam, threshold, *, clip_border: box_mask(cam, threshold, clip_border=clip_border, backend="reference")
    released = _baseline("box_mask").opencv_loop
    return lambda cam, threshold, *, clip_border: released(cam.cpu(), threshold, clip_border=clip_border).to(cam.device)


@dataclass
class Report:
    """Milliseconds per image (median of the runs), peak bytes above the inputs (largest image), share of equal pixels."""

    images: int
    runs: int
    machine: str
    agreement: float
    milliseconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    peak_bytes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            "",
            f"{'stage, per image':<22}{'ours':>11}{'eager':>12}{'faster':>9}   {'memory: ours':>13}{'eager':>11}{'less':>8}",
        ]
        total = tuple(sum(times[side] for times in self.milliseconds.values()) for side in (0, 1))
        for stage, (ours, eager) in {**self.milliseconds, "together": total}.items():
            memory = self.peak_bytes.get(stage)
            if stage == "together" and self.peak_bytes:
                memory = tuple(max(peak[side] for peak in self.peak_bytes.values()) for side in (0, 1))
            lines.append(f"{stage:<22}{ours:>8.1f} ms{eager:>9.1f} ms{eager / max(ours, 1e-3):>8.1f}×   {_memory(memory)}")
        lines += [
            "",
            f"Both give the same class to {100 * self.agreement:.3f} % of the pixels of {self.images} image{'s' * (self.images > 1)}.",
            f"ours = compiled operators, eager = the released algorithms in plain PyTorch{'' if importlib.util.find_spec('cv2') else ' (box_mask: our reference, as OpenCV is not installed)'}.",
            f"Time: median of {self.runs} alternating run{'s' * (self.runs > 1)}. Memory: peak above the inputs, largest image{'' if self.peak_bytes else ' (cannot be measured on this system)'}. {self.machine}.",
        ]
        return "\n".join(lines)


def _memory(peak: tuple[int, int] | None) -> str:
    if peak is None:
        return f"{'–':>13}{'–':>11}{'–':>8}"
    ours, eager = (p / 2**20 for p in peak)
    ratio = f"{eager / ours:>7.1f}×" if ours >= 1 else f"{'–':>8}"
    return f"{ours:>9.1f} MiB{eager:>7.1f} MiB{ratio}"


def machine(device: torch.device) -> str:
    """What the figures belong to."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        models = [
            line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def compare(jobs: Sequence[Job], classes: ClassTable, settings: Settings, device: torch.device) -> Report:
    """Runs both sides on the images of these jobs.

    Raises:
        UsageError: the released algorithms are not there, or have not these parameters.
    """
    sides = (Operators.compiled(), eager_operators())
    equal = pixels = images = 0
    times: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES if stage != "par" or settings.par_iter}
    fewest, largest, start = _RUNS, None, time.perf_counter()
    for job in tqdm(jobs, desc="comparing with eager PyTorch", unit="image", leave=False, disable=None):
        if time.perf_counter() - start > _PATIENCE:
            break
        inputs = runner.read_inputs(job, settings, classes, several=len(jobs) > 1)
        results = _alternate(inputs, settings, device, sides)
        images, fewest = images + 1, min(fewest, len(results))
        equal += int((results[0][0].label == results[0][1].label).sum())
        pixels += results[0][0].label.size
        for stage, found in times.items():
            found.append(tuple(statistics.median(pair[side].milliseconds.get(stage, 0.0) for pair in results) for side in (0, 1)))
        if largest is None or inputs.size > largest.size:
            largest = inputs
    means = {stage: tuple(statistics.fmean(pair[side] for pair in found) for side in (0, 1)) for stage, found in times.items()}
    peaks = peak_memory(largest, settings, device)
    return Report(images, fewest, machine(device), equal / pixels, means, {stage: peaks[stage] for stage in times if stage in peaks})


def _alternate(inputs: runner.Inputs, settings: Settings, device: torch.device, sides: tuple[Operators, Operators]) -> list[tuple]:
    results, start = [], time.perf_counter()
    while len(results) < _RUNS and (not results or time.perf_counter() - start < _BUDGET):
        results.append(
            tuple(refine(inputs.image, inputs.cam, inputs.features, inputs.values, settings, device=device, operators=ops) for ops in sides)
        )
    return results


def peak_memory(inputs: runner.Inputs, settings: Settings, device: torch.device) -> dict[str, tuple[int, int]]:
    """Peak bytes above the inputs by stage, (ours, eager); empty where it cannot be measured.

    Measured in a process of its own, in which the allocator returns every larger block to the system at once, so that
    what one stage has freed does not hide what the next one needs.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.npz"
        np.savez(file, image=inputs.image, cam=inputs.cam, features=inputs.features, values=inputs.values)
        request = {"file": str(file), "settings": asdict(settings), "device": str(device), "threads": torch.get_num_threads()}
        command = [sys.executable, "-m", "wsss_models.refine.memory"]
        child = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    if child.returncode != 0:
        print(f"wsss refine: memory could not be measured: {(child.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
        return {}
    return {stage: (ours, eager) for stage, (ours, eager) in json.loads(child.stdout.splitlines()[-1]).items()}

"""Training steps of a method with the fused kernels and with the reference backend: time, memory, loss, share of the operators.

    python benchmarks/end_to_end.py gland --data GLAS --config configs/gland_small.yaml --out RUN

For each training stage whose turn has come in RUN: both backends start from the same weights, see the same batches and take turns.
Leaves `RUN/end_to_end/<stage>.csv`, `<stage>.json` and `<stage>.png` (both loss curves side by side).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  (the clone must come first on the path)
from accelerate.utils import send_to_device  # noqa: E402

import wsss_kernels as wk  # noqa: E402
from benchmarks.operator_share import share_of_operators  # noqa: E402
from benchmarks.training_steps import WARM_UP  # noqa: E402
from wsss_kernels.testing import peak_memory  # noqa: E402
from wsss_models.engine import Context, Stage, Training, config as configs, run as runs, stream  # noqa: E402
from wsss_models.engine.method import find  # noqa: E402
from wsss_models.errors import InputError, UsageError  # noqa: E402

BACKENDS = {"fused": None, "reference": "reference"}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Steps:
    """A training stage, one optimiser step at a time."""

    def __init__(self, context: Context, stage: Stage, steps: int):
        self.context, self.job, self.step = context, runs.build(context, stage), 0
        self.job.model.to(context.device).train()
        for group in self.job.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        seed = context.seed(stage.name)
        batches = stream.Batches(len(self.job.dataset), self.job.batch_size, seed, 0, steps)
        data = stream.loader(self.job.dataset, batches, seed=seed, skip_bad=False, workers=0, collate=self.job.collate)
        self.batches = [send_to_device(batch, context.device) for batch, _ in data]

    def __call__(self) -> float:
        job = self.job
        for group in job.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (job.schedule(self.step) if job.schedule is not None else 1)
        self.context.seed_all(self.context.stage, "step", self.step, 0)
        loss = job.loss(job.model, self.batches[self.step])["loss"]
        loss.backward()
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if job.after_step is not None:
            job.after_step(self.step)
        return float(loss.detach())


def measure(context: Context, stage: Stage, steps: int) -> dict[str, dict[str, Any]]:
    """Of each backend loss and seconds of each step, peak bytes and share of one further step each. The backends take turns, step
    by step, so that a neighbour on the machine disturbs both."""
    runners: dict[str, Steps] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, backend in BACKENDS.items():
        with wk.use_backend(backend):
            runners[name], found[name] = Steps(context, stage, steps + 2), {"losses": [], "seconds": []}
    for _ in range(steps):
        for name, backend in BACKENDS.items():
            with wk.use_backend(backend):
                _synchronize()
                started = time.perf_counter()
                found[name]["losses"].append(runners[name]())
                _synchronize()
                found[name]["seconds"].append(time.perf_counter() - started)
    for name, backend in BACKENDS.items():
        values = found[name]
        values["median_seconds"] = statistics.median(values["seconds"][WARM_UP:] or values["seconds"])
        with wk.use_backend(backend):
            values["peak_bytes"], _ = peak_memory(runners[name])
            values["operator_share"] = share_of_operators(runners[name])
    return found


def _write(folder: Path, name: str, found: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**about, **found}, indent=2) + "\n")
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *[f"{what}_{backend}" for what in ("loss", "seconds") for backend in found]])
        writer.writerows(
            zip(range(len(found["fused"]["losses"])), *(found[b][w] for w in ("losses", "seconds") for b in found), strict=False)
        )
    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 3.5), sharey=True)
    for axis, (backend, values) in zip(axes, found.items(), strict=True):
        axis.plot(values["losses"])
        axis.set(title=f"{backend}: {1000 * values['median_seconds']:.0f} ms a step", xlabel="step", ylabel="loss")
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", type=Path, help="as for `wsss run`; for a finished run its own RUN/config.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True, help="a run, new or finished")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    try:
        method = find(args.method)
        context = runs.open_run(method, configs.load(method.config, args.config, args.set), args.data, args.out)
    except (UsageError, InputError) as error:
        print(error, file=sys.stderr)
        return 2
    for stage in method.stages(context.config):
        if stage.kind not in ("train", "segment"):
            continue
        try:
            if not isinstance(runs.build(context, stage), Training):
                continue
            found = measure(context, stage, args.steps)
        except (UsageError, InputError) as error:
            print(f"{stage.name}: left out ({error})")
            continue
        about = {
            "method": method.name,
            "device": str(context.device),
            "threads": torch.get_num_threads(),
            "versions": runs.about.versions(),
        }
        _write(args.out / "end_to_end", stage.name, found, about)
        for name, values in found.items():
            print(
                f"{stage.name} {name}: {1000 * values['median_seconds']:.1f} ms a step, peak {values['peak_bytes'] / 2**20:.1f} MiB, "
                f"operators {100 * values['operator_share']:.1f} %, last loss {values['losses'][-1]:.6f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

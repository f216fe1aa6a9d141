"""A training stage: one loop for all methods, which can be ended at any step and continued bit for bit."""

from __future__ import annotations

import contextlib
import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import UsageError
from . import checkpoint, stream
from .context import Context
from .interrupt import Interrupt


@dataclass
class Training:
    """What a training stage's `build` returns.

    Args:
        model: with its initial weights. What must stay in eval mode overrides `train` to stay so.
        dataset: map-style. Its random numbers (Python's, NumPy's, PyTorch's) are seeded for each sample by the engine.
        loss: `(model, batch) -> {"loss": minimised, other names: logged}`. It calls `model(…)`, not its submodules, so that
            gradients are averaged over processes; a loss over the whole batch gathers with `wsss_kernels.distributed`.
        optimizer: over the model's (and `extra`'s) trainable parameters, with initial learning rates.
        steps: optimiser steps.
        batch_size: samples in one forward pass, over all processes.
        schedule: step -> factor of the initial learning rates; see `schedules`.
        accumulate: forward passes for one optimiser step.
        clip: largest gradient norm.
        extra: further things with `state_dict` and `load_state_dict` (an EMA copy, a queue); tensors and plain values only.
        after_step: `step -> None`, after each optimiser step (an EMA update).
        validate: `model -> {name: value}`, in eval mode and without gradient, every `validate_every` steps and at the end.
        best: the name in `validate`'s result whose largest value decides which weights are kept; `None` keeps the last.
        patience: validations without a new best after which the stage ends.
        unused_parameters: some trainable parameters get no gradient in some step.
    """

    model: nn.Module
    dataset: Dataset
    loss: Callable[[nn.Module, Any], dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    steps: int
    batch_size: int
    schedule: Callable[[int], float] | None = None
    accumulate: int = 1
    clip: float | None = None
    collate: Callable[[list], Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    after_step: Callable[[int], None] | None = None
    validate: Callable[[nn.Module], dict[str, float]] | None = None
    validate_every: int = 0
    best: str | None = None
    patience: int | None = None
    unused_parameters: bool = False

    def run(self, context: Context) -> dict[str, Any]:
        """Trains to the end, from the last checkpoint if there is one; leaves `model.pt`, `log.csv`, `validation.csv`."""
        return _Loop(self, context).run()


class Log:
    """A CSV file of one row per call. Rows of steps after `step`, which a killed run left, are dropped."""

    def __init__(self, path: Path, step: int, write: bool):
        self.path, self.write, self.columns = path, write, None
        if not write or not path.is_file():
            return
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        whole = [row for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdigit() and int(row[0]) <= step]
        if whole:
            self.columns = rows[0]
        with checkpoint.whole_file(path) as file:
            file.write("".join(",".join(row) + "\n" for row in ([rows[0], *whole] if whole else [])).encode())

    def row(self, values: dict[str, Any]) -> None:
        if not self.write:
            return
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if self.columns is None:
                self.columns = list(values)
                writer.writerow(self.columns)
            writer.writerow([values.get(name, "") for name in self.columns])


class _Loop:
    """The state of a running training stage."""

    def __init__(self, job: Training, context: Context):
        self.job, self.context, self.config = job, context, context.config
        if job.batch_size < 1 or job.batch_size % context.processes:
            raise UsageError(
                f"batch_size: expected a multiple of the number of processes ({context.processes}), at least 1, got {job.batch_size}"
            )
        if len(job.dataset) == 0:
            raise UsageError(f"stage {context.stage}: the training set is empty")
        self.folder = context.folder()
        self.file = self.folder / "checkpoint.pt"
        self.step, self.seconds, self.stale = 0, 0.0, 0
        self.top: float | None = None
        self.last: dict[str, float] = {}
        self.pending: list[Tensor] = []
        self.names: list[str] = []
        for group in job.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        job.model.to(context.device)
        self._resume()
        context.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=job.unused_parameters)
        self.model, self.optimizer = context.accelerator.prepare(job.model, job.optimizer)
        self.log = Log(self.folder / "log.csv", self.step, context.main)
        self.validations = Log(self.folder / "validation.csv", self.step, context.main)
        self.board = self._tensorboard() if self.config.tensorboard and context.main else None

    def _tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("tensorboard: the package is not installed. Run: pip install tensorboard") from None
        return SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1)

    def _resume(self) -> None:
        if not self.file.is_file():
            return
        state, job = checkpoint.read_state(self.file), self.job
        try:
            job.model.load_state_dict(state["model"])
            job.optimizer.load_state_dict(state["optimizer"])
            for name, thing in job.extra.items():
                thing.load_state_dict(state["extra"][name])
            if self.context.accelerator.scaler is not None and state["scaler"] is not None:
                self.context.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.seconds, self.top, self.stale, self.last = (state[k] for k in ("step", "seconds", "top", "stale", "last"))
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            text = str(error).rpartition(chr(10))[2].strip()
            raise UsageError(f"{self.file}: is of another model or configuration ({text}). Delete it to start this stage again") from None

    def save(self) -> None:
        """Everything that the next step depends on. Its random numbers depend on seed, step and process alone."""
        if self.context.main:
            scaler = self.context.accelerator.scaler
            checkpoint.save(
                self.file,
                {
                    "format": checkpoint.FORMAT,
                    "step": self.step,
                    "seconds": self.seconds,
                    "top": self.top,
                    "stale": self.stale,
                    "last": self.last,
                    "model": self.job.model.state_dict(),
                    "optimizer": self.job.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "extra": {name: thing.state_dict() for name, thing in self.job.extra.items()},
                },
            )
        self.context.accelerator.wait_for_everyone()

    def run(self) -> dict[str, Any]:
        job, context = self.job, self.context
        batches = stream.Batches(
            len(job.dataset),
            job.batch_size,
            context.seed(context.stage),
            self.step * job.accumulate,
            job.steps * job.accumulate,
            context.rank,
            context.processes,
        )
        pin = context.device.type == "cuda"
        data = stream.loader(
            job.dataset,
            batches,
            seed=context.seed(context.stage),
            skip_bad=self.config.skip_bad,
            workers=self.config.workers,
            collate=job.collate,
            pin=pin,
        )
        self.model.train()
        with (
            Interrupt(context) as interrupt,
            tqdm(total=job.steps, initial=self.step, unit="step", desc=context.stage, disable=None if context.main else True) as bar,
        ):
            source = iter(data)
            while self.step < job.steps and not self._stopped_early():
                started = time.perf_counter()
                self._train_step(source)
                self.seconds += time.perf_counter() - started
                bar.update()
                self._after_step(bar, interrupt)
        return self._finish()

    def _stopped_early(self) -> bool:
        return self.job.patience is not None and self.stale >= self.job.patience

    def _train_step(self, source) -> None:
        job, accelerator = self.job, self.context.accelerator
        if job.schedule is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * job.schedule(self.step)
        total: Tensor | None = None
        for micro in range(job.accumulate):
            batch, bad = next(source)
            self.context.bad.update(dict.fromkeys(bad, "left out of training"))
            self.context.seed_all(self.context.stage, "step", self.step, micro)
            last = micro == job.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                losses = job.loss(self.model, send_to_device(batch, self.context.device))
                accelerator.backward(losses["loss"] / job.accumulate)
            self.names = list(losses)
            values = torch.stack([value.detach().float() for value in losses.values()]) / job.accumulate
            total = values if total is None else total + values
        if job.clip is not None:
            accelerator.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], job.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if job.after_step is not None:
            job.after_step(self.step)
        self.pending.append(total)

    def _after_step(self, bar: tqdm, interrupt: Interrupt) -> None:
        job, config, end = self.job, self.config, self.step == self.job.steps
        due = end or self.step % config.checkpoint_every == 0
        if due or self.step % config.log_every == 0:
            self._flush(bar)
        if job.validate is not None and (end or (job.validate_every and self.step % job.validate_every == 0)):
            self._validate()
        stop = interrupt.asked(self.step)
        if due or stop:
            self.save()
        if stop:
            raise KeyboardInterrupt(f"stage {self.context.stage} is saved at step {self.step}; the same command goes on from there")

    def _flush(self, bar: tqdm) -> None:
        """Logs the mean over the steps since the last row and over the processes."""
        mean = self.context.accelerator.reduce(torch.stack(self.pending).mean(0), "mean").tolist()
        self.pending.clear()
        self.last = dict(zip(self.names, mean, strict=True))
        if not all(map(math.isfinite, mean)):
            raise UsageError(
                f"stage {self.context.stage}: the loss is not finite at step {self.step}: {self.last}. Try a smaller learning rate"
            )
        rate = self.optimizer.param_groups[0]["lr"]
        self.log.row({"step": self.step, "lr": rate, "seconds": round(self.seconds, 3), **self.last})
        bar.set_postfix({name: f"{value:.4g}" for name, value in self.last.items()})
        if self.board is not None:
            for name, value in {**self.last, "lr": rate}.items():
                self.board.add_scalar(name, value, self.step)

    def _validate(self) -> None:
        job = self.job
        started = time.perf_counter()
        job.model.eval()
        with torch.no_grad():
            found = [job.validate(job.model)]
        job.model.train()
        if self.context.processes > 1:
            broadcast_object_list(found)
        self.seconds += time.perf_counter() - started
        self.validations.row({"step": self.step, **found[0]})
        self.last |= found[0]
        if job.best is None:
            return
        if self.top is None or found[0][job.best] > self.top:
            self.top, self.stale = found[0][job.best], 0
            if self.context.main:
                checkpoint.save(self.folder / "best.pt", job.model.state_dict())
        else:
            self.stale += 1

    def _finish(self) -> dict[str, Any]:
        if self.board is not None:
            self.board.close()
        best = self.job.best is not None and self.top is not None
        if self.context.main:
            weights = checkpoint.load_weights(self.folder / "best.pt") if best else self.job.model.state_dict()
            checkpoint.save(self.folder / "model.pt", weights)
        self.context.accelerator.wait_for_everyone()
        parameters = sum(p.numel() for p in self.job.model.parameters())
        found = {"steps": self.step, "parameters": parameters, **self.last, "training_seconds": round(self.seconds, 2)}
        return {**found, f"best_{self.job.best}": self.top} if best else found

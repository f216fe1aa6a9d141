"""What the stages of one run share: configuration, folders, device, processes, and the files that could not be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import nn

from ..errors import InputError, UsageError
from .checkpoint import load_weights
from .stream import derive, seed_everything

T = TypeVar("T")


def make_accelerator(device: str, mixed_precision: str) -> Accelerator:
    """
    Raises:
        UsageError: a device that is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: cuda was asked for, but PyTorch sees no GPU here")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not distributed)  # or a second run in this process keeps the first one's precision
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision, kwargs_handlers=[ddp])


@dataclass
class Context:
    """
    Args:
        config: the method's.
        data: the folder of the data set.
        out: the folder of the run.
        accelerator: devices and processes.
    """

    config: Any
    data: Path
    out: Path
    accelerator: Accelerator
    stage: str = ""
    bad: dict[str, str] = field(default_factory=dict)
    """name → why it could not be read."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes what all of them write once."""
        return self.accelerator.is_main_process

    def folder(self, stage: str | None = None) -> Path:
        """The folder of a stage (default: the running one)."""
        return self.out / (stage or self.stage)

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process."""
        return items[self.rank :: self.processes]

    def gather(self, objects: list[T]) -> list[T]:
        """The lists of all processes as one."""
        return gather_object(objects) if self.processes > 1 else objects

    def load(self, model: nn.Module, stage: str) -> nn.Module:
        """Puts the weights that a training stage left into `model`, on the device, in eval mode.

        Raises:
            UsageError: the stage has not finished, or its weights are those of another model.
        """
        file = self.folder(stage) / "model.pt"
        if not file.is_file():
            raise UsageError(f"stage {self.stage}: stage {stage} must be run first ({file} is not there)")
        try:
            model.load_state_dict(load_weights(file))
        except RuntimeError as error:
            raise UsageError(f"{file}: holds the weights of another model ({str(error).rpartition(chr(10))[2].strip()})") from None
        return model.to(self.device).eval()

    def array(self, stage: str, name: str) -> np.ndarray:
        """`NAME.npy` that a writing stage left, as float32.

        Raises:
            UsageError: the stage has not been run.
            InputError: the file is damaged.
        """
        path = self.folder(stage) / f"{name}.npy"
        try:
            return np.load(path, allow_pickle=False).astype(np.float32)
        except FileNotFoundError:
            raise UsageError(f"stage {self.stage}: stage {stage} must be run first ({path} is not there)") from None
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: cannot be read ({error}); delete it and run stage {stage} again") from None

    def seed(self, *parts: Any) -> int:
        """A seed for one purpose, such as `context.seed("split")`: the same in every process and in every continuation."""
        return derive(self.config.seed, *parts)

    def seed_all(self, *parts: Any) -> None:
        """Seeds Python, NumPy and PyTorch, each process differently."""
        seed_everything(derive(self.config.seed, *parts, self.rank))

    @contextlib.contextmanager
    def tolerating(self, name: str) -> Iterator[None]:
        """With `skip_bad` an `InputError` in here is noted under `name` and swallowed."""
        try:
            yield
        except InputError as error:
            if not self.config.skip_bad:
                raise
            self.bad[name] = str(error)

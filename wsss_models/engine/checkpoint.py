"""Files of weights and of training states: written whole or not at all, read without running anything that is in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..refine.outputs import OutputError, whole_file

FORMAT = 1


class _Remembering:
    """A file that keeps the operating system's refusal, which `torch.save` turns into an error of its own."""

    def __init__(self, file):
        self.file, self.refusal = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.refusal = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(path: Path, content: Any) -> None:
    """`torch.save` to a file that appears under its name only when it is complete.

    Raises:
        OutputError: the disk is full, the folder has gone, …
    """
    with whole_file(path) as file:
        remembering = _Remembering(file)
        try:
            torch.save(content, remembering)
        except (RuntimeError, OSError):
            if remembering.refusal is not None:
                raise remembering.refusal from None
            raise


def read(path: Path) -> Any:
    """What `torch.save` or safetensors wrote; only tensors and plain values are admitted.

    Raises:
        UsageError: no such file, a damaged one, one that holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].split("\n")[0]
        raise UsageError(f"{path}: holds more than tensors and plain values, and is not loaded ({reason})") from None
    except Exception as error:  # whatever a damaged file provokes in the readers
        raise UsageError(f"{path}: is damaged or not a checkpoint ({type(error).__name__}: {str(error).partition(chr(10))[0]})") from None


def load_weights(path: Path, *keys: str) -> dict[str, torch.Tensor]:
    """The flat dictionary of tensors in a checkpoint.

    Args:
        path: `.safetensors`, or anything that `torch.save` wrote.
        keys: names under which the dictionary may be nested, tried in this order; `model` and `state_dict` always are.

    Raises:
        UsageError: as `read`, or the file holds no dictionary of tensors.
    """
    found = read(path)
    for key in (*keys, "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise UsageError(f"{path}: expected a dictionary of tensors, got {type(found).__name__}")
    return {str(name): tensor for name, tensor in found.items()}


def read_state(path: Path) -> dict[str, Any]:
    """A training state.

    Raises:
        UsageError: as `read`, with what to do.
    """
    try:
        state = read(path)
    except UsageError as error:
        raise UsageError(f"{error}. Delete the file to start this stage again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"{path}: expected a training state of format {FORMAT}, got another. Delete the file to start this stage again")
    return state


__all__ = ["FORMAT", "OutputError", "load_weights", "read", "read_state", "save"]

"""A method, as the engine sees it: a configuration and an ordered list of named stages."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import wsss_models

from ..errors import UsageError
from .context import Context

KINDS = ("precompute", "train", "pseudo-label", "segment", "predict", "evaluate")
"""What the commands call the stages. `train` and `segment` are both training."""


class Job(Protocol):
    """What a stage builds: `Training`, `Writing`, `Evaluation`, or anything else that runs and returns figures."""

    def run(self, context: Context) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Stage:
    """One step of a method.

    Args:
        name: also the name of its folder in the run.
        kind: one of `KINDS`.
        build: `context -> Job`. Called when the stage's turn has come, so it may read what earlier stages wrote.
    """

    name: str
    kind: str
    build: Callable[[Context], Job]

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"stage {self.name}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")


@dataclass(frozen=True)
class Method:
    """
    Args:
        name: the package's.
        config: a dataclass derived from `RunConfig`.
        stages: `config -> stages` in their order.
        predictor: `context -> (image [H, W, 3] uint8 -> label [H, W] uint8)`, for `wsss predict --images`; `None` if the
            method's inputs are no photographs.
    """

    name: str
    config: type
    stages: Callable[[Any], Sequence[Stage]]
    predictor: Callable[[Context], Callable[[np.ndarray], np.ndarray]] | None = None


def names() -> list[str]:
    """The packages of `wsss_models` that are methods."""
    found = [module for module in pkgutil.iter_modules(wsss_models.__path__) if module.ispkg]
    return [m.name for m in found if any(s.name == "method" for s in pkgutil.iter_modules([f"{m.module_finder.path}/{m.name}"]))]


def find(name: str) -> Method:
    """`METHOD` of `wsss_models/<name>/method.py`, or of any importable module if the name is dotted.

    Raises:
        UsageError: there is none.
    """
    module = name if "." in name else f"wsss_models.{name}.method"
    try:
        method = importlib.import_module(module).METHOD
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise UsageError(f'the package {error.name} is not installed. Run: pip install "wsss_kernels[models]"') from None
        raise UsageError(f"METHOD: expected one of {', '.join(names())}, or a module, got {name!r}") from None
    except AttributeError:
        raise UsageError(f"METHOD: the module {module} has no METHOD") from None
    return method

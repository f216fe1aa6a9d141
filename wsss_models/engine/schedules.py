"""Learning rates as functions of the step: factors for the optimiser's initial rates. Nothing to store, nothing to resume."""

from __future__ import annotations

import math
from collections.abc import Callable


def polynomial(steps: int, power: float = 0.9, *, warmup: int = 0, ratio: float = 1e-3, floor: float = 0.0) -> Callable[[int], float]:
    """(1 − t/steps)^power, at least `floor`; before that, `warmup` steps that rise linearly from `ratio`."""

    def factor(step: int) -> float:
        decay = max((1 - min(step / max(steps, 1), 1)) ** power, floor)
        return decay * (ratio + (1 - ratio) * step / warmup) if step < warmup else decay

    return factor


def cosine_restarts(period: int, *, floor: float = 0.0, every: int = 1) -> Callable[[int], float]:
    """Cosine from 1 to `floor` over `period` units of `every` steps, then again."""

    def factor(step: int) -> float:
        phase = (step // every % period) / period
        return floor + (1 - floor) * (1 + math.cos(math.pi * phase)) / 2

    return factor


def count_steps(asked: int | None, epochs: int, samples: int, per_step: int) -> int:
    """`asked`, or else the steps of this many epochs, at least one."""
    return asked if asked is not None else max(1, epochs * math.ceil(samples / per_step))

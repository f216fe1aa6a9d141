"""The process in which `compare.peak_memory` measures; reads its request from stdin, answers on stdout."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import compare
from .pipeline import Operators, refine
from .settings import Settings

_STATUS = Path("/proc/self/status")


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


class Probe:
    """Wraps operators; keeps the largest growth of memory during each of their calls."""

    def __init__(self, operators: Operators, device: torch.device):
        self.device, self.peak = device, dict.fromkeys(compare.STAGES, 0)
        self.operators = Operators(**{stage: self._wrap(stage, getattr(operators, stage)) for stage in compare.STAGES})

    def _wrap(self, stage: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def probed(*args, **kwargs):
            before = self._reset()
            result = operator(*args, **kwargs)
            self.peak[stage] = max(self.peak[stage], self._highest() - before)
            return result

        return probed

    def _reset(self) -> int:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
        return _resident("VmRSS")

    def _highest(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        return _resident("VmHWM")


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    settings = Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in request["settings"].items()})
    peaks = []
    for operators in (Operators.compiled(), compare.eager_operators()):
        # Once on something small, so that what libraries load and keep at their first call is not counted.
        refine(
            np.zeros((64, 64, 3), np.uint8),
            np.ones((1, 8, 8), np.float32),
            np.ones((2, 8, 8, 8), np.float32),
            None,
            settings,
            device=device,
            operators=operators,
        )
        probe = Probe(operators, device)
        with np.load(request["file"]) as inputs:
            values = [int(v) for v in inputs["values"]]
            refine(inputs["image"], inputs["cam"], inputs["features"], values, settings, device=device, operators=probe.operators)
        peaks.append(probe.peak)
    print(json.dumps({stage: (peaks[0][stage], peaks[1][stage]) for stage in compare.STAGES}))


if __name__ == "__main__":
    main()

"""Finds the launch configurations that are fastest on this GPU: `python -m wsss_kernels.bench --tune`.

A launcher names its configuration, its fixed choice and a few alternatives (`_triton.config`). The tuner runs the benchmark cases,
tries the alternatives of every configuration that they ask for, one at a time, and writes the fastest to a JSON file that
later calls read. Without that file the fixed choices are used; nothing is ever tried at a user's call.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import _native
from ._spec import Case, OpSpec
from .testing import cast, flatten, gradient_tensors


def _call(spec: OpSpec, case: Case, device: str) -> Callable[[], None]:
    args, kwargs = cast(case.make(), torch.float32, device)
    if case.backward:
        for t in gradient_tensors(spec, None, args, kwargs):
            t.requires_grad_()

    def call() -> None:
        live = [t for t in flatten(spec.public(*args, **kwargs, backend="triton")) if t.requires_grad]
        if live:
            torch.autograd.backward(live, [torch.ones_like(t) for t in live])

    return call


def _milliseconds(call: Callable[[], None], seconds: float) -> float:
    """Median of the runs that fit into the time, at least 3; the first, which compiles, is not counted."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def tune_case(spec: OpSpec, case: Case, seconds: float) -> dict[str, dict[str, int]]:
    """The fastest configuration for every key that the case asks for, where there is a choice."""
    from . import _triton

    call = _call(spec, case, "cuda" if torch.cuda.is_available() else "cpu")
    _triton.asked.clear()
    call()
    best: dict[str, dict[str, int]] = {}
    for key, choices in [(key, choices) for key, choices in _triton.asked.items() if len(choices) > 1]:
        times = []
        for choice in choices:
            _triton.overrides[key] = dict(choice)
            try:
                times.append(_milliseconds(call, seconds))
            except Exception as error:  # a choice that does not fit this GPU (registers, shared memory) is no candidate
                print(f"  {key} {choice}: {error}")
                times.append(float("inf"))
            finally:
                del _triton.overrides[key]
        fastest = min(range(len(choices)), key=times.__getitem__)
        best[key] = dict(choices[fastest])
        print(f"  {key}: {times[fastest]:.3f} ms with {best[key]}, {times[0]:.3f} ms with the fixed choice", flush=True)
    return best


def tune(work: Iterable[tuple[OpSpec, Case]], seconds: float = 0.3) -> Path:
    """Tunes the Triton kernels that these cases launch, and writes what was found beside what the file holds already.

    Raises:
        RuntimeError: there is no GPU here.
    """
    if not (torch.cuda.is_available() or _native.INTERPRETED):
        raise RuntimeError("tuning needs a GPU, and PyTorch sees none here")
    from . import _triton

    file = _triton.config_file()
    found = json.loads(file.read_text()) if file.is_file() else {}
    for spec, case in work:
        if "triton" in spec.backends:
            print(f"{spec.name} {case.name}", flush=True)
            found |= tune_case(spec, case, seconds)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            os.replace(part, file)
    _triton.forget_tuned()
    return file

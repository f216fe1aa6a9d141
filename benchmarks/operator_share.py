"""The part of a training step that our operators need, whichever backend runs them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator

import torch

from wsss_kernels import ops  # noqa: F401  (imports the references)

_REFERENCE = "wsss_kernels reference"
_KERNELS = ("wsss::", "wsss_triton::")
_NODE = "autograd::engine::evaluate_function"


@contextlib.contextmanager
def _marked_references() -> Iterator[set[int]]:
    """The references' outermost calls are ranges for the profiler; gives the numbers of the autograd nodes that they make.

    By these numbers their backward is found, which runs long after the call.
    """
    nodes: set[int] = set()
    inside = False
    number = torch._C._autograd._get_sequence_nr

    def marked(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            nonlocal inside
            if inside:
                return function(*args, **kwargs)
            inside, first = True, number()
            try:
                with torch.profiler.record_function(_REFERENCE):
                    return function(*args, **kwargs)
            finally:
                inside = False
                nodes.update(range(first, number()))

        return call

    with contextlib.ExitStack() as stack:
        for module in [m for name, m in sys.modules.items() if re.fullmatch(r"wsss_kernels\.ops\.\w+\.reference", name)]:
            for name, function in inspect.getmembers(module, inspect.isfunction):
                stack.callback(setattr, module, name, function)
                setattr(module, name, marked(function))
        yield nodes


def share_of_operators(step: Callable[[], object]) -> float:
    """Time in the operators, forward and backward, over the time of one step, both from the profiler."""
    with _marked_references() as nodes, torch.profiler.profile() as profiler:
        step()
    gpu = torch.cuda.is_available()
    # What a GPU does is told twice: with the call that asked for it, and as an event of its own.
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CPU]
    whole = sum(e.self_device_time_total if gpu else e.self_cpu_time_total for e in events)
    ours = [
        e for e in events if e.name == _REFERENCE or e.name.startswith(_KERNELS) or (e.name.startswith(_NODE) and e.sequence_nr in nodes)
    ]
    return sum(e.device_time_total if gpu else e.cpu_time_total for e in ours) / whole if whole else 0.0

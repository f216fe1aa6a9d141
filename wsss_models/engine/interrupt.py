"""Ctrl-C and SIGTERM end a training loop between two steps, when its state is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch

from .context import Context


class Interrupt:
    """`with Interrupt(context) as interrupt`: signals are noted; a second one takes effect at once."""

    def __init__(self, context: Context):
        self.context, self.noted, self.before = context, False, {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            self._restore()
            raise KeyboardInterrupt
        self.noted = True

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def asked(self, step: int) -> bool:
        """Whether to stop after this step. Processes agree on it, every `log_every` steps."""
        if self.context.processes == 1:
            return self.noted
        if step % self.context.config.log_every:
            return False
        flag = torch.tensor(float(self.noted), device=self.context.device)
        return self.context.accelerator.reduce(flag, "sum").item() > 0

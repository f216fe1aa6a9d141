"""Ctrl-C while an operator runs: Python hears of it only when the operator returns, which can take seconds on a large image."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_GRACE = 0.3  # seconds in which Python usually gets to its own KeyboardInterrupt


@contextlib.contextmanager
def told(leave: Callable[[int], None] = os._exit) -> Iterator[None]:
    """Within it, a Ctrl-C that has to wait for an operator is acknowledged at once, and a second one ends the process.

    Signals are seen by a thread through the wake-up pipe, which the C handler writes to. Files of results cannot be harmed:
    they appear under their names when they are complete. Elsewhere than in the main thread, and on Windows, does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, over, leave), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")  # wakes the thread
        watcher.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, over: threading.Event, leave: Callable[[int], None]) -> None:
    told = False
    while not over.is_set():
        if signal.SIGINT not in os.read(reader, 1):
            continue
        if told:
            print("\nwsss: interrupted at once", file=sys.stderr, flush=True)
            leave(130)
        if not over.wait(_GRACE) and not select.select([reader], [], [], 0)[0]:
            print("\nwsss: interrupted: waiting for the current step; Ctrl-C again ends it at once", file=sys.stderr, flush=True)
        told = True

"""Processes that work for a run: they leave signals to it, and do not outlive it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def born_deaf() -> Iterator[None]:
    """Within it, processes are started for which SIGINT and SIGTERM stay blocked.

    A terminal, or `kill`, tells them to the whole group; the run may have to save before it ends.
    """
    resource_tracker.ensure_running()  # To start it unblocks the signals.
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def end_with_parent(*_: int) -> None:
    """Ends this process, from now on, when the one that started it is gone, however it went."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

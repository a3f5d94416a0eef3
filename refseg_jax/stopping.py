"""What SIGTERM and Ctrl-C do: training saves before it leaves, everything else ends together."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from refseg_jax.errors import INTERRUPTED, TERMINATED, UserError


class Stopped(UserError):
    """The run was told to stop, and is saved; with several processes, all raise it at one step.

    The exit status tells it from a failure: it is that of what the signal, "SIGINT" or "SIGTERM",
    would have ended.
    """

    def __init__(self, name: str, step: int):
        super().__init__(
            f"stopped by {name} at step {step}, which is saved: "
            "run the same command again to go on",
            INTERRUPTED if name == "SIGINT" else TERMINATED,
        )


class StopRequest:
    """Remembers SIGTERM and SIGINT, so that the loop can save before it leaves.

    With several processes JAX catches SIGTERM: that of any process reaches all of them, and they
    agree on the step to stop at.
    """

    def __init__(self):
        self.signal = None
        self.start = 0  # The step that the run goes on from.
        self._several = jax.process_count() > 1
        self._previous = {}

    def after(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after every step."""
        # JAX has them meet one step after the last that any of them asked for, or at 1.
        if self._several and multihost_utils.reached_preemption_sync_point(step - self.start):
            self.signal = "SIGTERM"
        return self.signal is not None

    def _note(self, number, _):
        self._restore()  # A second signal is not caught.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: ends after this step, saved; once more ends it now\n".encode())
        if self._several:
            signal.raise_signal(signal.SIGTERM)
        else:
            self.signal = name

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __enter__(self):
        self._caught = threading.current_thread() is threading.main_thread()
        if self._caught:
            for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc):
        self._restore()
        if self._several and self._caught:  # Nobody would heed it from here on.
            stopped = isinstance(exc[1], Stopped) or (exc[1] is None and self.signal)
            signal.signal(signal.SIGTERM, signal.SIG_IGN if stopped else signal.SIG_DFL)


class _Signaled(BaseException):
    """Goes past whoever would call any Exception a damaged file."""


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Lets SIGTERM or Ctrl-C to one of several processes end all, where there is nothing to save.

    JAX would take note of SIGTERM, for `StopRequest` to ask. One process alone ends as ever.

    Raises:
      UserError: there was a signal; with its exit status.
    """
    if jax.process_count() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, _):
        raise _Signaled(signal.Signals(number).name)

    previous = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Signaled as e:
        status = INTERRUPTED if str(e) == "SIGINT" else TERMINATED
        raise UserError(f"stopped by {e}: run the same command again", status) from e
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

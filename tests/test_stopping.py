"""What signals end, and with which exit status."""

import os
import signal

import jax
import pytest

from refseg_jax import main
from refseg_jax.errors import INTERRUPTED, TERMINATED, UserError
from refseg_jax.stopping import ending_on_signals

NUMBERS = signal.SIGINT, signal.SIGTERM


@pytest.fixture(autouse=True)
def handlers():
    """Puts back those that there were."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)]
)
def test_a_signal_is_not_taken_for_a_damaged_file(number, status, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    before = signal.getsignal(number)
    with pytest.raises(UserError, match=f"stopped by {number.name}") as caught, ending_on_signals():
        try:
            signal.raise_signal(number)
        except Exception as e:
            raise UserError("damaged") from e
    assert caught.value.status == status and signal.getsignal(number) is before


def test_to_one_process_signals_do_what_they_ever_did():
    before = [signal.getsignal(number) for number in NUMBERS]
    with ending_on_signals():
        assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_start_is_ended_at_once(monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main.end_on_signals()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # As of a program in a script's background.
    main.end_on_signals()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    # A container's first process, which no signal ends that it has not asked for.
    monkeypatch.setattr(os, "getpid", lambda: 1)
    main.end_on_signals()
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == TERMINATED

"""The one exception that is meant for the person at the keyboard."""

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

# Of a file or folder that is not ours to use, a disk that is full, a name that is too long.
UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    errno.ENAMETOOLONG,
)

# Exit statuses, as a shell has them, of what SIGINT and SIGTERM ended.
INTERRUPTED, TERMINATED = 130, 143
# And of what wrote to someone who had gone, as `head` does.
UNREAD = 141


class UserError(Exception):
    """Bad input: the message says what was wrong, where, and what to do about it.

    The command lines print it as a single line and exit with `status`; everything else is a bug
    and keeps its traceback.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def say(text: str) -> None:
    """A line on stderr, also of what damaged files brought into it and no terminal can show."""
    print(text.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def tell(*lines: str) -> None:
    """Writes to stdout what is left and these, if anyone reads it. UserError: its disk is full."""
    try:
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    except OSError as e:
        close_stdout()
        if not isinstance(e, BrokenPipeError):
            raise UserError(f"stdout: {e.strerror}") from e


def close_stdout() -> None:
    """What is, and is still to be, written there goes nowhere: Python writes it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def fail(message: str, status: int = 2) -> NoReturn:
    """One line on stderr, and the end with that exit status."""
    say(f"error: {' '.join(message.split())}")
    sys.exit(status)


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Makes a UserError in `main`, of a bucket or a file, one line on stderr and its status.

    Where nobody reads stdout any more, it ends without a word.
    """

    @functools.wraps(main)
    def checked(*args) -> int:
        try:
            with bucket_errors(), file_errors():
                status = main(*args)
                sys.stdout.flush()
                return status
        except UserError as e:
            say(f"error: {' '.join(str(e).split())}")
            return e.status
        except KeyboardInterrupt:
            say("stopped")
            return INTERRUPTED
        except BrokenPipeError:
            close_stdout()
            return UNREAD

    return checked


@contextlib.contextmanager
def file_errors(place: str = "a file") -> Iterator[None]:
    """What is not ours to use, or full, is a UserError within, at `place` if no file is named."""
    try:
        yield
    except OSError as e:
        if e.errno not in UNUSABLE:
            raise
        raise UserError(f"{e.filename or place}: {e.strerror}") from e


@contextlib.contextmanager
def bucket_errors() -> Iterator[None]:
    """What gs:// needs and is not there, a library or the bucket, is a UserError within."""
    try:
        yield
    except ImportError as e:
        if "gcsfs" not in str(e):
            raise
        raise UserError(f"gs:// needs a library (pip install 'etils[epath-gcs]'): {e}") from e
    except FileNotFoundError as e:
        if "Bucket does not exist" not in str(e):
            raise
        raise UserError(
            f"{e}: make it, or, if it is there and empty, let this account see it "
            "(roles/storage.legacyBucketReader)"
        ) from e

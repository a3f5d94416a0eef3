"""The one exception that is meant for the person at the keyboard."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Bad input: the message says what was wrong, where, and what to do about it.

    The command lines print it as a single line and exit with status 2; everything else is a bug
    and keeps its traceback.
    """


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

"""Files: read with a clear error, written whole or not at all, and their checksums."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

from etils import epath

from refseg_jax.errors import UserError


def read_bytes(path: pathlib.Path) -> bytes:
    """A file's contents. UserError: it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name to write to, which becomes `path` once it is whole and on the disk.

    Nothing happens to `path` if something fails before, or the file is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.exists():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file, whole or not at all, here (it keeps its mode) or in a bucket.

    Raises:
      OSError: it cannot be written; what was there before is there still.
    """
    data = content.encode() if isinstance(content, str) else content
    # Whole is what an object of a bucket always is; a device or a pipe is not to be replaced.
    if re.match(r"\w+://|/(dev|proc)/", os.fspath(path)):
        epath.Path(path).write_bytes(data)
        return
    place = pathlib.Path(os.path.realpath(path))
    try:
        with replacing(place) as temporary:
            temporary.write_bytes(data)
            if place.exists():
                shutil.copymode(place, temporary)
    except OSError as error:  # Of the file that is meant, not of the one that was to replace it.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def left_over(folder: pathlib.Path) -> list[pathlib.Path]:
    """What `replacing` was writing in processes that were killed."""
    return [path for path in folder.iterdir() if re.fullmatch(r"\..+\.\d+\.tmp", path.name)]


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Keeps out whoever else locks `path`; the lock goes when the process goes, however it ends.

    A folder, or a file, which is made: a network file system locks no folders. Where there are no
    locks nobody is kept out. UserError: it is locked, by another `what`.
    """
    folder = os.path.isdir(path)
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            folder = path if folder else os.path.dirname(path)
            raise UserError(f"another {what} is writing to {folder}: wait for it") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes plain data, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The inverse of `write_json`. UserError: the file is damaged."""
    try:
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): delete {path.parent} and prepare the data again"
        ) from error


def sha256(path: pathlib.Path) -> str:
    """Of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: pathlib.Path) -> dict[str, Any]:
    """`bytes` and `sha256` of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}

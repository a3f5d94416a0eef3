"""Annotation files: JSON, and pickles from strangers, read without trusting them."""

import collections
import io
import json
import pathlib
import pickle
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from refseg_jax import pickles
from refseg_jax.errors import UserError

_INSTANCE_FIELDS = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"id": int, "image_id": int},
    "categories": {"id": int, "name": str},
}


# What plain data does without: an object's state, and memory taken in advance.
_NOT_PLAIN = {pickle.BUILD[0]: "an object's state", pickle.BYTEARRAY8[0]: "a bytearray"}


def _refuse(what: str) -> Callable[[Any], None]:
    def refused(unpickler) -> None:
        raise pickle.UnpicklingError(f"it holds {what}, which is not plain data")

    return refused


class _PlainUnpickler(pickles.Unpickler):
    """Builds nothing but plain containers, strings, numbers and bytes: refs come from strangers.

    Most plain values need no import at all; these few do, depending on the pickle's protocol.
    """

    dispatch = pickles.Unpickler.dispatch | {
        code: _refuse(what) for code, what in _NOT_PLAIN.items()
    }
    _ADMITTED = {
        ("__builtin__", "set"): set,
        ("builtins", "set"): set,
        ("__builtin__", "frozenset"): frozenset,
        ("builtins", "frozenset"): frozenset,
        ("collections", "OrderedDict"): collections.OrderedDict,
        # How protocols 0 to 2 spell bytes: text and its encoding, always latin-1.
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin-1"),
    }

    def _decode_string(self, value: bytes) -> str:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it holds {module}.{name}, which is not plain data: do not trust this file"
            ) from None


def read(path: pathlib.Path) -> Any:
    """Contents of a JSON file, or of a pickle of plain data.

    Python 2's strings are taken as UTF-8, or where they are none as latin-1.

    Raises:
      UserError: the file is missing or damaged, or holds more than plain data.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        # No pickle begins with a bracket, whatever its name.
        if path.suffix.lower() == ".json" or re.match(rb"\s*[\[{]", data):
            return json.loads(data)
        return _PlainUnpickler(io.BytesIO(data)).load()
    # A damaged pickle can raise almost anything.
    except Exception as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}): fetch it again"
        ) from error


def read_records(path: pathlib.Path, fields: dict[str, type | tuple]) -> list[dict]:
    """`read`, then `check_records`."""
    return check_records(read(path), fields, str(path))


def check_records(value: Any, fields: dict[str, type | tuple], where: str) -> list[dict]:
    """`value`, made sure to be a list of dicts with these fields of these types, or a UserError.

    Numbers have up to 64 bits: what has thousands of digits cannot even be written into a message.
    """
    if not isinstance(value, list):
        raise UserError(f"{where}: a list is expected, not {type(value).__name__}")
    for number, record in enumerate(value):
        for field, kind in fields.items():
            found = record.get(field) if isinstance(record, dict) else None
            # To Python, True is a number.
            if (
                not isinstance(found, kind)
                or isinstance(found, bool)
                or (isinstance(found, int) and not -(2**63) <= found < 2**63)
            ):
                raise UserError(f"{where}: record {number} lacks a usable {field!r}")
    return value


def instance_tables(
    path: pathlib.Path, repeated: Callable[[str], None] | None = None
) -> dict[str, dict[int, dict]]:
    """`images`, `annotations` and `categories` of an instances.json, each by id.

    `repeated` is told of every record whose id was there before, and the first one counts.

    Raises:
      UserError: unreadable, a field is missing, or, without `repeated`, an id stands for two
        things.
    """
    tables = read(path)
    if not isinstance(tables, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(tables).__name__}")
    tables = {"categories": [], **tables}  # Not everybody names what is seen.
    by_id = {}
    for name, fields in _INSTANCE_FIELDS.items():
        by_id[name] = {}
        for record in check_records(tables.get(name), fields, f"{path}, {name}"):
            first = by_id[name].setdefault(record["id"], record)
            if first is record:
                continue
            if repeated:
                repeated(f"{path.name}, {name}: id {record['id']}")
            elif first != record:
                raise UserError(
                    f"{path}, {name}: id {record['id']} stands for two different records"
                )
    return by_id


def segmentation(annotation: dict) -> list | dict:
    """An annotation's polygons or run-length code; [] where it has none, such as a box alone."""
    found = annotation.get("segmentation")
    return found if isinstance(found, list | dict) else []


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be read: spaces, marks without a letter, control characters."""
    return all(unicodedata.category(c)[0] in "ZCM" or c == "\ufffd" for c in text)


def clean_text(text: str, what: str) -> str:
    """An expression without space around it. UserError: nothing is left, or it is no Unicode."""
    text = text.strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is no valid Unicode ({error.reason})") from None
    if is_blank(text):
        raise UserError(f"{what} is empty")
    return text

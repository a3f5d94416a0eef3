"""Pickles from strangers: what the readers of annotations and of weights have in common."""

import functools
import pickle
from collections.abc import Callable
from typing import Any

# Steps that may put a tuple or a frozenset on the stack.
_MAY_BUILD = (
    pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.FROZENSET
    + pickle.REDUCE + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.INST + pickle.OBJ
    + pickle.PERSID + pickle.BINPERSID
)  # fmt: skip
_LARGEST = 10_000


def _bounded(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """A step of an unpickler, made to refuse what is too large for a tuple of tuples."""

    @functools.wraps(load)
    def checked(unpickler) -> None:
        load(unpickler)
        built = unpickler.stack[-1]
        if not isinstance(built, tuple | frozenset):
            return
        within = [unpickler.sizes[id(v)][1] for v in built if id(v) in unpickler.sizes]
        size = len(built) + sum(within)
        if within and size > _LARGEST:
            raise pickle.UnpicklingError(f"it holds tuples within tuples, over {_LARGEST} values")
        unpickler.sizes[id(built)] = built, size  # Held, so that no other gets its id.

    return checked


class Unpickler(pickle._Unpickler):
    """The unpickler in Python, for files that may be damaged or malicious.

    The one in C asks for as much memory as a damaged number says. Tuples (and frozensets) within
    tuples have no more values than a real file's, counted as often as they are held: with one that
    holds another twice, and so on, some bytes suffice for a name whose hash takes for ever, or
    overflows the stack.
    """

    dispatch = {
        code: _bounded(load) if code in _MAY_BUILD else load
        for code, load in pickle._Unpickler.dispatch.items()
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sizes: dict[int, tuple[tuple | frozenset, int]] = {}  # By id: it, and its values.

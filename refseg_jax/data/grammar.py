"""Referring expressions as small programs: proposed, executed on the scene, put into words.

An expression is a program (`Filter`, `Pick` or `Relate`) and its wording. A program is kept only
if executing it on the scene's things leaves exactly the one that is meant. Execution is strict on
purpose: it returns every thing that a person might take it to mean, so a near tie between two
things leaves two of them, and the program is dropped.

Nothing here knows about drawings: a thing is a category, a centre, a size and whatever other
facts its source knows (photographs may know none), and a `Lexicon` names them.
"""

import bisect
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

KINDS = ("attribute", "place", "superlative", "ordinal", "relation")


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. `facts["category"]` is its noun; other facts (colour, ...) are adjectives.

    `x` and `y` are the centre as fractions of the image's width and height; `size` is a length
    (say, the square root of the area), of which only ratios matter.
    """

    facts: Mapping[str, str]
    x: float
    y: float
    size: float


@dataclasses.dataclass(frozen=True)
class Filter:
    """All things that have these facts: ((name, value), ...). No facts: all things."""

    facts: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Pick:
    """The thing of that `rank` (0 is first) when `among` are sorted by `SCORES[key]`.

    Its score must not exceed `limit`: "the left heart" has to lie on the left.
    """

    among: Filter
    key: str
    rank: int = 0
    limit: float = math.inf


@dataclasses.dataclass(frozen=True)
class Relate:
    """Those of `among` that stand in `relation` to the one thing that `anchor` describes."""

    among: Filter
    relation: str
    anchor: Filter


Program = Filter | Pick | Relate


@dataclasses.dataclass(frozen=True)
class Expression:
    """A wording, its kind (one of `KINDS`), and the program that it stands for."""

    text: str
    kind: str
    program: Program


# How far a thing is from being the best example of a key: lower is better.
SCORES: dict[str, Callable[[Thing], float]] = {
    "left": lambda t: t.x,
    "right": lambda t: 1 - t.x,
    "top": lambda t: t.y,
    "bottom": lambda t: 1 - t.y,
    "top left": lambda t: max(t.x, t.y),
    "top right": lambda t: max(1 - t.x, t.y),
    "bottom left": lambda t: max(t.x, 1 - t.y),
    "bottom right": lambda t: max(1 - t.x, 1 - t.y),
    "middle": lambda t: max(abs(t.x - 0.5), abs(t.y - 0.5)),
    "biggest": lambda t: -math.log(t.size),
    "smallest": lambda t: math.log(t.size),
}
SIDES = ("left", "right", "top", "bottom")
_BY_SIZE = ("biggest", "smallest")
# Scores up to which a thing is plainly in a part of the picture.
LIMITS = {key: 0.42 for key in SCORES if key not in _BY_SIZE} | {"middle": 0.15}
# Scores nearer to each other than this are a tie to the eye: a tenth of the side, a fifth in size.
_GAPS = {key: math.log(1.2) if key in _BY_SIZE else 0.1 for key in SCORES}

_DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def _holds(relation: str, thing: Thing, anchor: Thing) -> bool | None:
    """Whether the relation plainly holds (True), plainly does not (False), or neither (None)."""
    dx, dy = thing.x - anchor.x, thing.y - anchor.y
    if relation == "next to":
        distance = math.hypot(dx, dy)
        yes, no = distance <= 0.35, distance >= 0.47
    else:
        right, down = _DIRECTIONS[relation]
        along, across = dx * right + dy * down, abs(dx * down) + abs(dy * right)
        yes, no = along >= 0.12 and across <= 0.65 * along, across >= 2 * along
    return True if yes else False if no else None


def execute(program: Program, things: Sequence[Thing]) -> tuple[int, ...]:
    """Indices of all things that a person might take the program to mean, in order.

    Empty when nothing plainly fits; more than one when several fit or nearly tie.
    """
    match program:
        case Filter(facts):
            wanted = set(facts)
            return tuple(i for i, t in enumerate(things) if wanted <= t.facts.items())
        case Pick(among, key, rank, limit):
            scores = {i: SCORES[key](things[i]) for i in execute(among, things)}
            if rank >= len(scores) or (chosen := sorted(scores.values())[rank]) > limit:
                return ()
            return tuple(i for i, score in scores.items() if abs(score - chosen) < _GAPS[key])
        case Relate(among, relation, anchor):
            anchors = execute(anchor, things)
            if len(anchors) != 1:
                return ()
            verdicts = {
                i: _holds(relation, things[i], things[anchors[0]])
                for i in execute(among, things)
                if i != anchors[0]
            }
            if True not in verdicts.values():
                return ()
            return tuple(i for i, verdict in verdicts.items() if verdict is not False)
    raise TypeError(f"not a program: {program!r}")


# The wording. {np} is a noun phrase, {anchor} one with an article.
_SIDE_PLACES = ("{0} {{np}}", "{0} {{np}}", "{{np}} {0}", "{{np}} on {0}")
_CORNER_PLACES = ("{{np}} {0}", "{0} {{np}}", "{{np}} in the {0}", "{{np}} in {0} corner", "{0}")
_PLACE_PATTERNS = {
    "left": ("left", (*_SIDE_PLACES, "{{np}} on the {0}", "{{np}} on the {0} side")),
    "right": ("right", (*_SIDE_PLACES, "{{np}} on the {0}", "{{np}} on the {0} side")),
    "top": ("top", (*_SIDE_PLACES, "{{np}} at the {0}", "upper {{np}}")),
    "bottom": ("bottom", (*_SIDE_PLACES, "{{np}} at the {0}", "lower {{np}}")),
    "top left": ("top left|upper left", _CORNER_PLACES),
    "top right": ("top right|upper right", _CORNER_PLACES),
    "bottom left": ("bottom left|lower left", _CORNER_PLACES),
    "bottom right": ("bottom right|lower right", _CORNER_PLACES),
    "middle": ("middle|center", ("{{np}} in the {0}", "{{np}} in {0}")),
}
PLACES = {
    key: tuple(p.format(name) for name in names.split("|") for p in patterns)
    for key, (names, patterns) in _PLACE_PATTERNS.items()
}
SUPERLATIVES = {
    "biggest": ("biggest {np}", "largest {np}"),
    "smallest": ("smallest {np}", "tiniest {np}"),
    "left": ("leftmost {np}", "far left {np}", "{np} farthest left"),
    "right": ("rightmost {np}", "far right {np}", "{np} farthest right"),
    "top": ("topmost {np}", "highest {np}", "{np} closest to the top"),
    "bottom": ("lowest {np}", "{np} closest to the bottom"),
}
_RANKS = (("first", "1st"), ("second", "2nd"), ("third", "3rd"))
_ORDINAL_PATTERNS = (
    "{0} {{np}} from the {1}",
    "{0} {{np}} from {1}",
    "{{np}} {0} from the {1}",
    "{{np}} {0} from {1}",
)
ORDINALS = {
    (side, rank): tuple(p.format(name, side) for name in names for p in _ORDINAL_PATTERNS)
    for side in SIDES
    for rank, names in enumerate(_RANKS)
}
RELATIONS = {
    "left of": ("{np} left of {anchor}", "{np} to the left of {anchor}"),
    "right of": ("{np} right of {anchor}", "{np} to the right of {anchor}"),
    "above": ("{np} above {anchor}", "{np} over {anchor}"),
    "below": ("{np} below {anchor}", "{np} under {anchor}"),
    "next to": ("{np} next to {anchor}", "{np} near {anchor}", "{np} close to {anchor}"),
}
_ARTICLE = "the"


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Words for facts; a category or value that it does not list is its own word.

    nouns: category -> names. adjectives: value -> words before the noun. phrases: value -> words
    after the noun ("with dots"). generic: nouns for a thing whose category is left out.
    """

    nouns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    adjectives: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    phrases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    generic: tuple[str, ...] = ("one", "thing", "object")

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Every word that a wording with the listed facts can contain, sorted."""
        tables = (
            *(self.nouns, self.adjectives, self.phrases),
            *(PLACES, SUPERLATIVES, ORDINALS, RELATIONS),
        )
        texts = [text for table in tables for texts in table.values() for text in texts]
        spoken = re.sub(r"\{\w+\}", " ", " ".join([_ARTICLE, *self.generic, *texts]))
        return tuple(sorted(set(spoken.split())))

    def noun_phrase(self, rng: np.random.Generator, facts: Filter) -> str:
        """Words for a filter: "small red star with dots", "striped one"."""
        head, before, after = self.generic, [], []
        # English puts the size first and leaves the order of the other adjectives open.
        for name, value in sorted(facts.facts, key=lambda f: (f[0] != "size", rng.random())):
            if name == "category":
                head = self.nouns.get(value, (value,))
            elif value in self.phrases and not after and rng.random() < 0.3:
                after.append(pick(rng, self.phrases[value]))
            else:
                before.append(pick(rng, self.adjectives.get(value, (value,))))
        return " ".join([*before, pick(rng, head), *after])

    def wording(self, rng: np.random.Generator, program: Program, kind: str) -> str:
        """One of the wordings of a program, lower case, without punctuation."""
        match program:
            case Filter():
                text = self.noun_phrase(rng, program)
            case Pick(among, key, rank):
                tables = {"place": PLACES, "superlative": SUPERLATIVES, "ordinal": ORDINALS}
                templates = tables[kind][(key, rank) if kind == "ordinal" else key]
                if among.facts:  # "top left" alone means the thing there, whatever it is
                    templates = [template for template in templates if "{np}" in template]
                text = pick(rng, templates).format(np=self.noun_phrase(rng, among))
            case Relate(among, relation, anchor):
                text = pick(rng, RELATIONS[relation]).format(
                    np=self.noun_phrase(rng, among),
                    anchor=f"{_ARTICLE} {self.noun_phrase(rng, anchor)}",
                )
        return f"{_ARTICLE} {text}" if rng.random() < 0.12 else text


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, uniformly (`rng.choice` is fifty times slower, and makes arrays)."""
    return items[int(rng.random() * len(items))]


def _facts(rng: np.random.Generator, thing: Thing) -> list[tuple[str, str]]:
    """The thing's facts in the order in which a speaker thinks of them: the noun mostly first."""
    eager = {"category": 0.15 if rng.random() < 0.8 else 2, "color": 0.6}
    return sorted(thing.facts.items(), key=lambda fact: eager.get(fact[0], 1) * rng.random())


def _unique(rng: np.random.Generator, things: Sequence[Thing], target: int) -> Filter:
    """Facts that single the target out (all of its facts if none do), now and then one more."""
    facts = _facts(rng, things[target])
    for count in range(1, len(facts) + 1):
        if execute(Filter(tuple(facts[:count])), things) == (target,):
            count += rng.random() < 0.35
            break
    return Filter(tuple(facts[:count]))


def _vague(rng: np.random.Generator, things: Sequence[Thing], target: int) -> Filter:
    """None, one or two of the target's facts, which need not single it out."""
    count = bisect.bisect((0.1, 0.7), rng.random())
    return Filter(tuple(_facts(rng, things[target])[:count]))


def _place(rng: np.random.Generator, things: Sequence[Thing], target: int) -> Program | None:
    keys = [key for key, limit in LIMITS.items() if SCORES[key](things[target]) <= limit]
    if not keys:
        return None
    key = pick(rng, keys)
    return Pick(_vague(rng, things, target), key, limit=LIMITS[key])


def _superlative(rng: np.random.Generator, things: Sequence[Thing], target: int) -> Program | None:
    among = _vague(rng, things, target)
    found = execute(among, things)
    keys = [
        key
        for key in SUPERLATIVES
        if SCORES[key](things[target]) == min(SCORES[key](things[i]) for i in found)
    ]
    return Pick(among, pick(rng, keys)) if len(found) > 1 and keys else None


def _ordinal(rng: np.random.Generator, things: Sequence[Thing], target: int) -> Program | None:
    among, key = _vague(rng, things, target), pick(rng, SIDES)
    found = execute(among, things)
    rank = sorted(found, key=lambda i: SCORES[key](things[i])).index(target)
    # Two things nobody counts.
    return Pick(among, key, rank) if rank < len(_RANKS) and len(found) > 2 else None


def _relation(rng: np.random.Generator, things: Sequence[Thing], target: int) -> Program | None:
    anchor = pick(rng, [i for i in range(len(things)) if i != target] or [target])
    relation = pick(rng, tuple(RELATIONS))
    return Relate(_vague(rng, things, target), relation, _unique(rng, things, anchor))


_PROPOSALS = {
    "attribute": _unique,
    "place": _place,
    "superlative": _superlative,
    "ordinal": _ordinal,
    "relation": _relation,
}
_TRIES = 12


def write(
    rng: np.random.Generator,
    things: Sequence[Thing],
    target: int,
    lexicon: Lexicon,
    weights: Mapping[str, float],
    taken: Collection[str] = (),
) -> Expression | None:
    """An expression that means `things[target]` and nothing else, or None if none was found.

    The kind is drawn by `weights` (a share per kind) among those in which one can be found; the
    texts in `taken` are not used again.
    """
    open_kinds = dict(weights)
    while open_kinds:
        bounds = list(itertools.accumulate(open_kinds.values()))
        kind = list(open_kinds)[bisect.bisect(bounds, rng.random() * bounds[-1])]
        for _ in range(_TRIES):
            program = _PROPOSALS[kind](rng, things, target)
            if program is not None and execute(program, things) == (target,):
                text = lexicon.wording(rng, program, kind)
                if text not in taken:
                    return Expression(text, kind, program)
        del open_kinds[kind]
    return None

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
    (say, the square root of the area), of which only ratios matter. `width` and `height`, again
    fractions, are known of photographs' boxes.
    """

    facts: Mapping[str, str]
    x: float
    y: float
    size: float
    width: float = 0.0
    height: float = 0.0


@dataclasses.dataclass(frozen=True)
class Filter:
    """All things that have these facts: ((name, value), ...). No facts: all things."""

    facts: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Pick:
    """The thing of that `rank` (0 is first) when `among` are sorted by `SCORES[key]`.

    Its score must not exceed `limit`: "the left heart" has to lie on the left. `alone`: nor may
    another's come near it: "the dog on the left" has to be the only one there.
    """

    among: Filter
    key: str
    rank: int = 0
    limit: float = math.inf
    alone: bool = False


@dataclasses.dataclass(frozen=True)
class Relate:
    """Those of `among` that stand in `relation` to the one thing that `anchor` describes.

    For "nearest" there must be others of `among` that are not.
    """

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


def _reach(a: Thing, b: Thing) -> tuple[float, float]:
    """How far the centres of two boxes are from each other where they touch, across and down."""
    return (a.width + b.width) / 2, (a.height + b.height) / 2


def _distance(a: Thing, b: Thing) -> float:
    """Between two boxes; 0 where they overlap."""
    reach_x, reach_y = _reach(a, b)
    return math.hypot(max(0.0, abs(a.x - b.x) - reach_x), max(0.0, abs(a.y - b.y) - reach_y))


def _holds(relation: str, thing: Thing, anchor: Thing) -> bool | None:
    """Whether the relation plainly holds (True), plainly does not (False), or neither (None)."""
    dx, dy = thing.x - anchor.x, thing.y - anchor.y
    reach_x, reach_y = _reach(thing, anchor)
    if relation == "next to":
        distance = math.hypot(dx, dy)
        yes, no = distance <= 0.35, distance >= 0.47
    else:
        right, down = _DIRECTIONS[relation]
        along, across = dx * right + dy * down, abs(dx * down) + abs(dy * right)
        # Boxes may overlap by a fifth: a cup on a table is not left of the table.
        apart = along >= 0.8 * (reach_x * abs(right) + reach_y * abs(down))
        yes = apart and along >= 0.12 and across <= 0.65 * along
        no = across >= 2 * along
    return True if yes else False if no else None


def _nearest(distances: Mapping[int, float]) -> tuple[int, ...]:
    """Which of two things or more are nearest, or nearly so."""
    best = min(distances.values(), default=math.inf)
    near = tuple(i for i, distance in distances.items() if distance < 0.05 + 1.5 * best)
    return near if len(distances) > 1 else ()


def execute(program: Program, things: Sequence[Thing]) -> tuple[int, ...]:
    """Indices of all things that a person might take the program to mean, in order.

    Empty when nothing plainly fits; more than one when several fit or nearly tie.
    """
    match program:
        case Filter(facts):
            wanted = set(facts)
            return tuple(i for i, t in enumerate(things) if wanted <= t.facts.items())
        case Pick(among, key, rank, limit, alone):
            scores = {i: SCORES[key](things[i]) for i in execute(among, things)}
            if rank >= len(scores) or (chosen := sorted(scores.values())[rank]) > limit:
                return ()
            if alone:
                return tuple(i for i, score in scores.items() if score < limit + _GAPS[key])
            return tuple(i for i, score in scores.items() if abs(score - chosen) < _GAPS[key])
        case Relate(among, relation, anchor):
            anchors = execute(anchor, things)
            if len(anchors) != 1:
                return ()
            others = [i for i in execute(among, things) if i != anchors[0]]
            if relation == "nearest":
                return _nearest({i: _distance(things[i], things[anchors[0]]) for i in others})
            verdicts = {i: _holds(relation, things[i], things[anchors[0]]) for i in others}
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
_UNIFORM = ("uni", "use", "eu", "one", "ufo")  # A vowel to the eye, none to the ear.
_SILENT = ("hour", "honest", "heir")


def with_a(noun_phrase: str) -> str:
    """The noun phrase with "a" or "an", by its sound: "an apple", "a unicycle"."""
    vowel = noun_phrase[:1].lower() in tuple("aeiou") and not noun_phrase.startswith(_UNIFORM)
    return f"{'an' if vowel or noun_phrase.startswith(_SILENT) else 'a'} {noun_phrase}"


def _table(wordings: Mapping) -> Mapping:
    """A field whose default is one of the tables above."""
    return dataclasses.field(default_factory=lambda: wordings)


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Words for facts; a category or value that it does not list is its own word.

    nouns: category -> names. adjectives: value -> words before the noun. phrases: value -> words
    after the noun ("with dots"). generic: nouns for a thing whose category is left out; if there
    are none, it never is. The tables give the wordings of what is picked or related, and so which
    programs are proposed at all.
    the: how often an expression begins with an article. a: how often it is "a" in descriptions
    that pick nothing; `uncounted` nouns cannot have that.
    """

    nouns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    adjectives: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    phrases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    generic: tuple[str, ...] = ("one", "thing", "object")
    places: Mapping[str, tuple[str, ...]] = _table(PLACES)
    superlatives: Mapping[str, tuple[str, ...]] = _table(SUPERLATIVES)
    ordinals: Mapping[tuple[str, int], tuple[str, ...]] = _table(ORDINALS)
    relations: Mapping[str, tuple[str, ...]] = _table(RELATIONS)
    the: float = 0.12
    a: float = 0.0
    uncounted: Collection[str] = ()

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Every word that a wording with the listed facts can contain, sorted."""
        tables = (
            *(self.nouns, self.adjectives, self.phrases),
            *(self.places, self.superlatives, self.ordinals, self.relations),
        )
        texts = [text for table in tables for texts in table.values() for text in texts]
        spoken = re.sub(r"\{\w+\}", " ", " ".join([_ARTICLE, *self.generic, *texts]))
        return tuple(sorted(set(spoken.split())))

    def can_say(self, program: Program) -> bool:
        """Whether there is a noun for everything that a program speaks of."""
        match program:
            case Filter():
                parts = (program,)
            case Pick(among):
                parts = (among,)
            case Relate(among, _, anchor):
                parts = (among, anchor)
        return bool(self.generic) or all("category" in dict(part.facts) for part in parts)

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
                if kind == "ordinal":
                    templates = self.ordinals[key, rank]
                else:
                    templates = (self.places if kind == "place" else self.superlatives)[key]
                if among.facts:  # "top left" alone means the thing there, whatever it is
                    templates = [template for template in templates if "{np}" in template]
                text = pick(rng, templates).format(np=self.noun_phrase(rng, among))
            case Relate(among, relation, anchor):
                text = pick(rng, self.relations[relation]).format(
                    np=self.noun_phrase(rng, among),
                    anchor=self._article(rng, self.noun_phrase(rng, anchor)),
                )
        if rng.random() >= self.the:
            return text
        return self._article(rng, text) if kind == "attribute" else f"{_ARTICLE} {text}"

    def _article(self, rng: np.random.Generator, noun_phrase: str) -> str:
        """The one or the other article before a noun phrase that nothing is picked from."""
        if self.a and noun_phrase not in self.uncounted and rng.random() < self.a:
            return with_a(noun_phrase)
        return f"{_ARTICLE} {noun_phrase}"


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, uniformly (`rng.choice` is fifty times slower, and makes arrays)."""
    return items[int(rng.random() * len(items))]


def _facts(rng: np.random.Generator, thing: Thing) -> list[tuple[str, str]]:
    """The thing's facts in the order in which a speaker thinks of them: the noun mostly first."""
    eager = {"category": 0.15 if rng.random() < 0.8 else 2, "color": 0.6}
    return sorted(thing.facts.items(), key=lambda fact: eager.get(fact[0], 1) * rng.random())


def _unique(
    rng: np.random.Generator, things: Sequence[Thing], target: int, lexicon: Lexicon
) -> Filter:
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


def _place(
    rng: np.random.Generator, things: Sequence[Thing], target: int, lexicon: Lexicon
) -> Program | None:
    keys = [key for key in lexicon.places if SCORES[key](things[target]) <= LIMITS[key]]
    if not keys:
        return None
    key = pick(rng, keys)
    among = _vague(rng, things, target)
    return Pick(among, key, limit=LIMITS[key], alone=True)


def _superlative(
    rng: np.random.Generator, things: Sequence[Thing], target: int, lexicon: Lexicon
) -> Program | None:
    among = _vague(rng, things, target)
    found = execute(among, things)
    keys = [
        key
        for key in lexicon.superlatives
        if SCORES[key](things[target]) == min(SCORES[key](things[i]) for i in found)
    ]
    return Pick(among, pick(rng, keys)) if len(found) > 1 and keys else None


def _ordinal(
    rng: np.random.Generator, things: Sequence[Thing], target: int, lexicon: Lexicon
) -> Program | None:
    sides = tuple(dict.fromkeys(side for side, _ in lexicon.ordinals))
    among, key = _vague(rng, things, target), pick(rng, sides)
    found = execute(among, things)
    rank = sorted(found, key=lambda i: SCORES[key](things[i])).index(target)
    # Two things nobody counts.
    return Pick(among, key, rank) if rank < len(_RANKS) and len(found) > 2 else None


def _relation(
    rng: np.random.Generator, things: Sequence[Thing], target: int, lexicon: Lexicon
) -> Program | None:
    anchor = pick(rng, [i for i in range(len(things)) if i != target] or [target])
    relation = pick(rng, tuple(lexicon.relations))
    return Relate(_vague(rng, things, target), relation, _unique(rng, things, anchor, lexicon))


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
    readings: Sequence[Sequence[Thing]] = (),
) -> Expression | None:
    """An expression that means `things[target]` and nothing else, or None if none was found.

    The kind is drawn by `weights` (a share per kind) among those in which one can be found; the
    texts in `taken` are not used again. `readings` are other ways to see the same things: measured
    otherwise, or without the last of them. The expression means the target in all of these too.
    """
    open_kinds = dict(weights)
    while open_kinds:
        bounds = list(itertools.accumulate(open_kinds.values()))
        kind = list(open_kinds)[bisect.bisect(bounds, rng.random() * bounds[-1])]
        for _ in range(_TRIES):
            program = _PROPOSALS[kind](rng, things, target, lexicon)
            if program is None or not lexicon.can_say(program):
                continue
            if all(execute(program, reading) == (target,) for reading in (things, *readings)):
                text = lexicon.wording(rng, program, kind)
                if text not in taken:
                    return Expression(text, kind, program)
        del open_kinds[kind]
    return None

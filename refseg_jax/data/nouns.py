"""What people call one thing of an annotated category: "cell_phone" -> "phone", "skis" -> "pair
of skis", "Traffic lights" -> "traffic light"; and which categories' things pass for each other.
"""

import collections
import functools
import itertools
import re
from collections.abc import Mapping

# Other names of COCO's categories, by what `noun` makes of them.
_SYNONYMS = {
    "airplane": ("plane",),
    "cell phone": ("phone",),
    "couch": ("sofa",),
    "dining table": ("table",),
    "donut": ("doughnut",),
    "hair drier": ("hair dryer",),
    "motorcycle": ("motorbike",),
    "bicycle": ("bike",),
    "potted plant": ("plant",),
    "refrigerator": ("fridge",),
    "sports ball": ("ball",),
    "tennis racket": ("racket",),
    "tv": ("television",),
    "wine glass": ("glass",),
}
# What annotators, or viewers, may take for each other.
_LOOK_ALIKES = (
    ("person", "man", "woman", "boy", "girl", "child", "kid", "baby", "player", "rider"),
    ("car", "truck", "van"),
    ("vehicle", "car", "truck", "van", "bus"),
    ("bicycle", "motorcycle"),
    ("chair", "couch", "bench"),
    ("couch", "bed"),
    ("cup", "bowl"),
    ("cup", "wine glass"),
    ("bottle", "vase"),
    ("vase", "potted plant"),
    ("handbag", "backpack", "suitcase"),
    ("keyboard", "laptop"),
    ("tv", "laptop"),
    ("cell phone", "remote"),
    ("microwave", "oven"),
    ("donut", "cake"),
    ("pizza", "sandwich", "hot dog"),
)
# Plurals that are one thing.
_PAIRS = (
    "binoculars", "glasses", "goggles", "headphones", "jeans", "leggings", "pants", "pliers",
    "scissors", "shorts", "skis", "sunglasses", "tights", "tongs", "trousers", "tweezers",
)  # fmt: skip
_PARTS = {"broccoli": "piece of broccoli", "bread": "piece of bread", "cattle": "cow"}
_SINGULARS = {
    "calves": "calf", "children": "child", "feet": "foot", "geese": "goose", "halves": "half",
    "knives": "knife", "leaves": "leaf", "loaves": "loaf", "men": "man", "mice": "mouse",
    "oxen": "ox", "people": "person", "policemen": "policeman", "scarves": "scarf",
    "shelves": "shelf", "teeth": "tooth", "wolves": "wolf", "women": "woman",
    "buses": "bus", "gases": "gas", "lenses": "lens", "shoes": "shoe", "canoes": "canoe",
    "movies": "movie", "cookies": "cookie", "ties": "tie", "pies": "pie", "zombies": "zombie",
}  # fmt: skip
_ENDS_IN_S = ("canvas", "gas", "lens", "series", "species", "chess", "tennis", "pancreas")
_UNCOUNTED = ("grass", "ground", "mud", "rice", "sand", "sky", "snow", "water", "wood")


def noun(category: str) -> str:
    """A category's name as the noun for one of its things, lower case; "" if it has no letters.

    Underscores, capitals within and remarks in brackets go; of names separated by commas the first
    is taken; plurals become singular.
    """
    text = re.sub(r"[(\[{].*?[)\]}]|(-(other|merged|stuff))+$", " ", category)
    text = re.split(r"[,;|]", text)[0].replace("/", " or ")
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|[_\s]+", " ", text).strip().lower()
    if not re.search(r"[^\W\d_]", text):
        return ""
    *before, last = text.split()
    if last in _PAIRS:
        return " ".join(["pair of", *before, last]) if before[:2] != ["pair", "of"] else text
    return " ".join([*before, _PARTS.get(last, _singular(last))])


def _singular(word: str) -> str:
    if word in _SINGULARS or word in _ENDS_IN_S:
        return _SINGULARS.get(word, word)
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"),
                            ("xes", "x"), ("oes", "o")):  # fmt: skip
        if len(word) > len(ending) + 1 and word.endswith(ending):
            return word.removesuffix(ending) + instead
    kept = len(word) < 4 or word.endswith(("ss", "us", "is", "'s"))
    return word if kept or not word.endswith("s") else word[:-1]


class Vocabulary:
    """The nouns of a set of categories, which may pass for each other.

    Args:
      categories: name -> the name of its supercategory, or "".

    Attributes:
      names: noun -> all names of such a thing, itself first; no name stands for two nouns.
      uncounted: names that cannot have "a".
    """

    def __init__(self, categories: Mapping[str, str]):
        self._above: dict[str, set[str]] = collections.defaultdict(set)
        for category, above in categories.items():
            self._above[noun(category)].add(noun(above))
        self.nouns = {category: noun(category) for category in categories}
        known = set(self.nouns.values()) - {""}
        uses = collections.Counter(name for n in known for name in _SYNONYMS.get(n, ()))
        self.names = {
            n: (n, *(s for s in _SYNONYMS.get(n, ()) if s not in known and uses[s] == 1))
            for n in sorted(known)
        }
        self.uncounted = tuple(n for n in known if n.split()[-1] in _UNCOUNTED)

    @functools.cached_property
    def confused(self) -> Mapping[str, tuple[str, ...]]:
        """noun -> the other nouns that a thing of it might answer to."""
        return {n: tuple(m for m in self.names if self._may_be(n, m)) for n in self.names}

    def _may_be(self, thing: str, meant: str) -> bool:
        if thing == meant:
            return False
        alike = any(thing in group and meant in group for group in _LOOK_ALIKES)
        pairs = itertools.product(self.names[thing], self.names[meant])
        return (
            alike
            or meant in self._above[thing]
            or any(mine.endswith(f" {theirs}") for mine, theirs in pairs)  # A hot dog, a dog.
        )

"""Scenes of the embedded dataset: what stands where, what is said about it, and how it is drawn.

A scene follows from its seed alone. Its geometry is in fractions of the side, so that the same
scene can be drawn at any size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from refseg_jax.data import grammar

# Fill colours and their names.
COLORS = {
    "red": (212, 38, 40),
    "yellow": (246, 218, 52),
    "green": (46, 160, 66),
    "blue": (42, 92, 214),
    "pink": (246, 146, 192),
    "white": (240, 240, 240),
}
# Radius in fractions of the side.
SIZES = {"small": (0.13, 0.145), "medium": (0.175, 0.195), "big": (0.22, 0.245)}
TEXTURES = ("plain", "striped", "dotted")
_PERIOD = {"striped": 0.062, "dotted": 0.075}  # of a texture, of the side
_DARKENING = 0.68  # how much darker a texture's second tone is
_CLOUD_KNOTS = 17  # of the finest clouds in the background, along a side
_NOISE = 8  # largest pixel noise, in grey levels

LEXICON = grammar.Lexicon(
    nouns={
        "circle": ("circle", "circle", "disc"),
        "cross": ("cross", "cross", "plus"),
        "diamond": ("diamond",),
        "heart": ("heart",),
        "ring": ("ring", "ring", "donut"),
        "square": ("square",),
        "star": ("star",),
        "triangle": ("triangle",),
    },
    adjectives={
        **{color: (color,) for color in COLORS},
        "small": ("small", "little"),
        "big": ("big", "large"),
        "plain": ("plain", "solid"),
        "striped": ("striped",),
        "dotted": ("dotted", "spotted"),
    },
    phrases={
        "striped": ("with stripes",),
        "dotted": ("with dots",),
    },
    generic=("one", "thing", "shape", "object"),
)

MAX_SHAPES = 4
_MIN_SHAPES = 3
# Of two centres, in sums of their radii: shapes may overlap if their colours tell them apart.
_MIN_DISTANCE = 0.5
_MIN_VISIBLE = 0.55  # of a shape's area; a little above one half, which must hold at every size
_CHECK_SIZE = 64  # side at which that is checked, so that a scene is the same at every size


@dataclasses.dataclass(frozen=True)
class Shape:
    """One object; centre and radius in fractions of the side, angles in radians."""

    category: str
    size: str
    color: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float
    texture_angle: float

    @property
    def thing(self) -> grammar.Thing:
        """What the grammar sees of it: nobody calls a thing medium."""
        facts = {name: getattr(self, name) for name in ("category", "color", "texture")}
        if self.size != "medium":
            facts["size"] = self.size
        return grammar.Thing(facts, self.x, self.y, self.radius)

    @property
    def filled_thing(self) -> grammar.Thing:
        """The same thing, its size measured by its area."""
        area = AREAS[self.category] * self.radius**2
        return dataclasses.replace(self.thing, size=math.sqrt(area))


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shapes from back to front, and the (shape index, its expressions) that are referred to."""

    shapes: tuple[Shape, ...]
    refs: tuple[tuple[int, tuple[grammar.Expression, ...]], ...]


def compose(
    seed: tuple[int, ...], num_refs: int, num_expressions: int, weights: Mapping[str, float]
) -> Scene:
    """The scene of a seed, with exactly so many refs and expressions per ref.

    Layouts that cannot give that many are thrown away, each deterministically.
    """
    rng = np.random.default_rng(seed)
    while True:
        shapes = _arrange(rng)
        if shapes is None:
            continue
        things = [shape.thing for shape in shapes]
        # Who is bigger, a wide star or a full circle, is for nobody to say.
        readings = [[shape.filled_thing for shape in shapes]]
        refs = []
        for target in rng.permutation(len(shapes)).tolist():
            expressions: list[grammar.Expression] = []
            while len(expressions) < num_expressions:
                taken = [expression.text for expression in expressions]
                found = grammar.write(rng, things, target, LEXICON, weights, taken, readings)
                if found is None:
                    break
                expressions.append(found)
            else:
                refs.append((target, tuple(expressions)))
            if len(refs) == num_refs:
                return Scene(shapes, tuple(refs))


def _arrange(rng: np.random.Generator) -> tuple[Shape, ...] | None:
    """Random shapes that share categories and colours and may overlap a little; None: no room."""
    count = int(rng.integers(_MIN_SHAPES, MAX_SHAPES + 1))
    categories = rng.permutation(list(SILHOUETTES))[: rng.integers(2, 5)].tolist()
    colors = rng.permutation(list(COLORS))[: rng.integers(2, 5)].tolist()
    shapes: list[Shape] = []
    for _ in range(count * 10):
        size = grammar.pick(rng, tuple(SIZES))
        radius = rng.uniform(*SIZES[size])
        x, y = rng.uniform(radius, 1 - radius, 2)
        color = grammar.pick(rng, colors)
        if any(
            math.hypot(x - other.x, y - other.y)
            < (radius + other.radius) * (1 if color == other.color else _MIN_DISTANCE)
            for other in shapes
        ):
            continue
        shapes.append(
            Shape(
                category=grammar.pick(rng, categories),
                size=size,
                color=color,
                texture=TEXTURES[max(0, int(rng.integers(-1, len(TEXTURES))))],
                x=x,
                y=y,
                radius=radius,
                angle=rng.uniform(-0.3, 0.3),
                texture_angle=rng.uniform(0, math.pi),
            )
        )
        if len(shapes) == count:
            break
    else:
        return None
    alphas = [_coverage(shape, _CHECK_SIZE) for shape in shapes]
    visible = np.bincount(_owners(alphas, _CHECK_SIZE).ravel() + 1, minlength=count + 1)[1:]
    areas = [np.count_nonzero(alpha > 0.5) for _, alpha in alphas]
    return tuple(shapes) if np.all(visible >= _MIN_VISIBLE * np.array(areas)) else None


# Silhouettes: signed distance (negative inside) at x, y in units of the radius, y downwards. They
# need to be true distances near the outline only, where the anti-aliasing reads them.


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    width, height = 0.7, 1.05
    return (np.abs(x) / width + np.abs(y) / height - 1) / math.hypot(1 / width, 1 / height)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    outer, inner = 1.08, 0.48
    x, y = np.abs(x), -y
    for side in (1, -1):  # fold the plane into the wedge of one point
        nx, ny = side * math.cos(math.pi / 5), -math.sin(math.pi / 5)
        over = 2 * np.maximum(nx * x + ny * y, 0)
        x, y = x - over * nx, y - over * ny
    ex, ey = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5) - outer
    return ((y - outer) * ex - np.abs(x) * ey) / math.hypot(ex, ey)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    side = 0.78
    x, y = np.abs(x), 0.08 - y
    lobe = np.hypot(x - side / 2, y - side / 2) - side * math.sqrt(0.5)
    return np.minimum(lobe, (x + np.abs(y) - side) * math.sqrt(0.5))


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.98, np.minimum(x, y) - 0.32)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(y - 0.65, math.sqrt(0.75) * np.abs(x) - 0.5 * (y + 0.98))


SILHOUETTES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.94,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
    "triangle": _triangle,
    "star": _star,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.26,
    "cross": _cross,
    "heart": _heart,
    "diamond": _diamond,
}

# Of silhouettes of radius 1.
AREAS = {
    "circle": 2.776,
    "square": 2.561,
    "triangle": 1.534,
    "star": 1.524,
    "ring": 2.287,
    "cross": 2.099,
    "heart": 2.173,
    "diamond": 1.470,
}

Box = tuple[slice, slice]


def _box(x: float, y: float, reach: float, size: int) -> tuple[Box, np.ndarray, np.ndarray]:
    """The pixels within `reach` of a point (pixels), and their offsets from it: [1, w], [h, 1]."""
    x0, x1 = max(int(x - reach), 0), min(int(x + reach) + 2, size)
    y0, y1 = max(int(y - reach), 0), min(int(y + reach) + 2, size)
    across = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - x)
    down = np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - y)
    return (slice(y0, y1), slice(x0, x1)), across[None, :], down[:, None]


def _turn(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _coverage(shape: Shape, size: int) -> tuple[Box, np.ndarray]:
    """The box of pixels that a shape may touch, and how much of each it covers, f32 in 0..1."""
    radius = shape.radius * size
    box, x, y = _box(shape.x * size, shape.y * size, 1.2 * radius, size)
    x, y = _turn(x / radius, y / radius, shape.angle)
    return box, np.clip(0.5 - radius * SILHOUETTES[shape.category](x, y), 0, 1)


def _owners(alphas: list[tuple[Box, np.ndarray]], size: int) -> np.ndarray:
    """int8 [size, size]: the shape that gives more than half of a pixel's colour, or -1."""
    shares = np.zeros((len(alphas), size, size), np.float32)
    owners = np.full((size, size), -1, np.int8)
    for i, (box, alpha) in enumerate(alphas):
        shares[:i, *box] *= 1 - alpha
        shares[i, *box] = alpha
    for i, (box, _) in enumerate(alphas):
        owners[box][shares[i, *box] > 0.5] = i
    return owners


def _fill(shape: Shape, box: Box, size: int, color: np.ndarray) -> np.ndarray:
    """Colours f32 [3, h, w] (or [3, 1, 1]) of a shape's surface within its box."""
    if shape.texture == "plain":
        return color
    x = np.arange(box[1].start, box[1].stop, dtype=np.float32)[None, :] - shape.x * size
    y = np.arange(box[0].start, box[0].stop, dtype=np.float32)[:, None] - shape.y * size
    turn = 2 * math.pi / (_PERIOD[shape.texture] * size)
    x, y = _turn(turn * x, turn * y, shape.texture_angle)
    match shape.texture:
        case "striped":
            dark = _soft(np.sin(x), turn)
        case "dotted":
            dark = _soft(np.cos(x) + np.cos(y) - 0.6, turn)
    return color * (1 - _DARKENING * dark)


def _soft(wave: np.ndarray, turn: float) -> np.ndarray:
    """1 where a wave is positive, 0 where it is negative, with an edge about one pixel wide."""
    return np.clip(0.5 + wave / turn, 0, 1)


@functools.cache
def _upsampling(knots: int, size: int) -> np.ndarray:
    """f32 [size, knots]: linear interpolation from a few values across the side."""
    at = np.linspace(0, knots - 1, size, dtype=np.float32)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(knots, dtype=np.float32)))


def _interpolate(values: np.ndarray, size: int) -> np.ndarray:
    """f32 [3, knots, knots] -> [3, size, size]."""
    up = _upsampling(values.shape[-1], size)
    return up @ values.astype(np.float32) @ up.T


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """f32 [3, size, size]: muted clouds with faint strokes and blobs on them."""
    clouds = rng.uniform(95, 150) + rng.uniform(-12, 12, (3, 1, 1))
    for knots, strength in ((2, 25), (5, 12), (_CLOUD_KNOTS, 5)):
        grey = rng.uniform(-strength, strength, (knots, knots))
        tint = rng.uniform(-0.3 * strength, 0.3 * strength, (3, knots, knots))
        clouds = clouds + _interpolate(grey + tint, _CLOUD_KNOTS)
    image = _interpolate(clouds, size)
    for _ in range(rng.integers(5, 10)):
        radius = size * rng.uniform(0.03, 0.16)
        flat = rng.uniform(0.05, 0.6)
        box, x, y = _box(*rng.uniform(0, size, 2), radius + 1, size)
        x, y = _turn(x, y, rng.uniform(0, math.pi))
        alpha = np.clip(flat * (radius - np.hypot(x, y / flat)), 0, 1)
        tone = rng.uniform(-28, 28) + rng.uniform(-8, 8, (3, 1, 1))
        image[:, *box] += alpha * tone.astype(np.float32)
    return image


def draw(scene: Scene, seed: tuple[int, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [size, size, 3] and owners int8 [size, size].

    A pixel's owner is the index of the shape that gives more than half of its colour, or -1: the
    visible part of shape i is `owners == i`. The seed drives what the scene leaves open: the
    background, the exact shades, the noise.
    """
    rng = np.random.default_rng(seed)
    image = _background(rng, size)  # channels first: long rows are what numpy is fast at
    alphas = [_coverage(shape, size) for shape in scene.shapes]
    for shape, (box, alpha) in zip(scene.shapes, alphas, strict=True):
        color = np.array(COLORS[shape.color]) * rng.uniform(0.92, 1.04) + rng.uniform(-8, 8, 3)
        fill = _fill(shape, box, size, color.astype(np.float32)[:, None, None])
        image[:, *box] += alpha * (fill - image[:, *box])
    noise = np.frombuffer(rng.bytes(image.size), np.int8).reshape(image.shape)
    image += noise * np.float32(_NOISE / 128)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), _owners(alphas, size)

"""What a model shows of its way to a mask, as small pictures for the report.

A model with `has_details` takes `details=True` and then also returns a dict `details`. These of its
entries are drawn: `word_attention`, a list of [B, T, h, w], what each word attends to;
`proposals` [B, N, h, w], logits, with `proposal_weights` [B, N]; `stage_logits`, a list of
[B, h, w], the mask as it grows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from refseg_jax import pictures
from refseg_jax.data import transforms
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.evaluate import Example

SIDE = 128  # px, of the pictures' longer side


@dataclasses.dataclass(frozen=True)
class Strip:
    """Pictures side by side: `pictures` holds pairs of a caption and uint8 [H, W, 3]."""

    heading: str
    pictures: tuple[tuple[str, np.ndarray], ...]


def explain(
    model: nn.Module,
    variables: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    image_size: int,
    max_tokens: int,
    letterbox: bool = False,
) -> list[tuple[Example, list[Strip]]]:
    """Each example with the strips of what `model` saw in it; none if it does not show any.

    `variables` may be laid out over a mesh, every device having all of them: the first that this
    process has is used.
    """
    if not examples or not getattr(model, "has_details", False):
        return []
    variables = jax.tree.map(lambda x: x.addressable_data(0), variables)
    images = np.stack([transforms.resize_image(e.image, image_size, letterbox) for e in examples])
    encoded = [tokenizer.encode(e.text, max_tokens)[:2] for e in examples]
    tokens, token_mask = (np.stack(part) for part in zip(*encoded, strict=True))

    @jax.jit
    def look(variables, images, tokens, token_mask):
        images = transforms.normalize_for(model, images)
        return model.apply(variables, images, tokens, token_mask, details=True)["details"]

    details = jax.device_get(look(variables, images, tokens, token_mask))
    stages = getattr(getattr(model, "config", None), "wpa_stages", ())
    explained = []
    for i, example in enumerate(examples):
        pieces = tokenizer.tokens(example.text)[1:-1][: max_tokens - 2]
        mine = jax.tree.map(lambda x, i=i: x[i], details)
        explained.append((example, strips(mine, pieces, example.image, letterbox, stages)))
    return explained


def strips(
    details: Mapping[str, Any],
    pieces: Sequence[str],
    image: np.ndarray,
    letterbox: bool = False,
    stages: Sequence[int] = (),
) -> list[Strip]:
    """Draws the `details` of one image uint8 [H, W, 3], whose expression has these `pieces`.

    `details` are those of the head of this file without their leading axis; the first token is a
    mark and the pieces follow it.
    """
    image = pictures.fit(image, SIDE)
    size = image.shape[:2]

    def drawn(values: np.ndarray) -> np.ndarray:
        if letterbox:  # The picture's edges need not lie between cells.
            values = transforms.resize_map(values, *(16 * side for side in values.shape))
        return pictures.heat(image, transforms.resize_map(values, *size, letterbox))

    def probability(logits: np.ndarray) -> np.ndarray:
        return drawn(1 / (1 + np.exp(-np.clip(logits, -30, 30))))

    result = []
    for i, attention in enumerate(details.get("word_attention", ())):
        maps = (x / x.max() for x in attention[1 : len(pieces) + 1])
        words = tuple((word, drawn(x)) for word, x in zip(pieces, maps, strict=True))
        stage = stages[i] if stages else i + 1
        result.append(Strip(f"What each word attends to, alignment {stage}", words))
    if "proposals" in details:
        weights = details["proposal_weights"]
        ranking = np.argsort(-weights)
        shown = (*ranking[:3], *ranking[3:][-1:])
        masks = tuple((f"{weights[n]:.4f}", probability(details["proposals"][n])) for n in shown)
        heading = f"Of {len(weights)} mask proposals those of most weight, and that of least"
        result.append(Strip(heading, masks))
    if details.get("stage_logits"):
        grown = enumerate(details["stage_logits"], 1)
        masks = tuple((f"stage {i}", probability(logits)) for i, logits in grown)
        result.append(Strip("The mask from stage to stage", masks))
    return result

"""How the matrices of new layers are drawn where that is as in released code."""

from typing import NamedTuple

from flax.linen import initializers
from flax.linen.initializers import Initializer

FLAX = initializers.lecun_normal()
# Of linear layers and convolutions for which code in PyTorch says nothing: U(-a, a) with
# a = 1 / sqrt(fan in), of which the variance is a third of Flax's.
PYTORCH = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Draws(NamedTuple):
    """Of the layers that a model adds to its encoders."""

    pixels: Initializer = FLAX  # Linear layers from pixels, in their fusion with the words.
    words: Initializer = FLAX  # Those from words, there.
    alignment: Initializer = FLAX  # Those of an alignment.
    decoder: Initializer = FLAX

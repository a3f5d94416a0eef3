"""Referring image segmentation in JAX and Flax: an image and an expression in, a mask out."""

__version__ = "0.1.0"

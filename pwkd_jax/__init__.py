"""Partial to whole knowledge distillation (arXiv 2109.12507) with width-slimmable teachers, in JAX and Flax."""

__version__ = "0.1.0"

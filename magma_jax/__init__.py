"""MAGMA in JAX/Flax: a frozen language model that sees, through an image prefix and adapters."""

__version__ = "0.1.0"

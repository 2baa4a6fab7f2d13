"""Trains a model from a config; by default the quick start. See ``magma_jax/cli/train.py``."""

import sys

from magma_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())

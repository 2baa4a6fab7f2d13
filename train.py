"""Trains a model from a config; by default the quick start. See ``magma_jax/cli/train.py``."""

from magma_jax.cli.train import main
from magma_jax.runtime.ending import end_process

if __name__ == "__main__":
    end_process(main())

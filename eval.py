"""Evaluates a run of train.py, or any checkpoint on a task. See ``magma_jax/cli/evaluate.py``."""

import sys

from magma_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())

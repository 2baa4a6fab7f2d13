"""A run of thirty steps, all of them saved: ``python -m tests.training.bucket_run ADDRESS``.

Prints a hash of its trained state.
"""

import hashlib
import sys

import jax
import numpy as np

from magma_jax import commands
from magma_jax.runtime.ending import end_process
from magma_jax.training.run import setup
from tests import tiny


def main(address: str) -> int:
    return commands.run("bucket_run", lambda: train(address))


def train(address: str) -> None:
    setup.load_dataset = lambda config: tiny.dataset()
    run = tiny.train(tiny.run_config(steps=30), address)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(run.state):
        digest.update(np.asarray(leaf).tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    end_process(main(*sys.argv[1:]))

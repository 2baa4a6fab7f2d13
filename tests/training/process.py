"""One of several processes of a tiny run: ``python process.py WORKDIR DATA FSDP MODEL STEPS``.

Prints a hash of what it holds of the trained state. With ``DIES_AFTER`` set it kills itself after so many steps.
"""

import hashlib
import os
import signal
import sys

import jax
import numpy as np

from magma_jax.families.magma import MAGMA
from magma_jax.runtime.distributed import distributed_run
from magma_jax.runtime.sharding import MeshConfig
from magma_jax.training import loop
from magma_jax.training.run import setup
from tests import tiny


def main() -> None:
    workdir, (data, fsdp, model, steps) = sys.argv[1], map(int, sys.argv[2:])
    setup.load_dataset = lambda config: tiny.dataset()
    if "DIES_AFTER" in os.environ:
        _die_after(int(os.environ["DIES_AFTER"]))
    with distributed_run():
        run = loop.train(MAGMA, tiny.mesh_config(MeshConfig(data, fsdp, model), steps), workdir)
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(run.state):
            for shard in leaf.addressable_shards:
                digest.update(np.asarray(shard.data).tobytes())
        print(digest.hexdigest())


def _die_after(steps: int) -> None:
    place_batch, placed = loop.place_batch, 0

    def place_or_die(*arguments):
        nonlocal placed
        placed += 1
        if placed > steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return place_batch(*arguments)

    loop.place_batch = place_or_die


if __name__ == "__main__":
    main()

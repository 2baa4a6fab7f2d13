"""One process of a tiny run: ``python process.py WORKDIR DATA FSDP MODEL STEPS``."""

import os
import sys

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
os.environ["JAX_PLATFORMS"] = "cpu"


from magma_jax.distributed import one_of_several
from magma_jax.sharding import MeshConfig
from magma_jax.training import loop, setup
from tests import tiny


def main() -> None:
    workdir, data, fsdp, model, steps = sys.argv[1], *map(int, sys.argv[2:])
    setup.load_dataset = lambda config: tiny.dataset()
    config = tiny.run_config(mesh=MeshConfig(data, fsdp, model), steps=steps, batch_size=8)
    with one_of_several("JAX_PROCESS_ID" in os.environ):
        loop.train(config, workdir)


if __name__ == "__main__":
    main()

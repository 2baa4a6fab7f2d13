"""MAGMA long (paper, section 4.3 and appendix A): like MAGMA base, on 7.6 million samples.

    python train.py --config configs/magma_long.py --set mesh.fsdp=16

configs/magma_base.py describes how to prepare its weights and data.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("magma_base.py"))
    config.steps = 7_600_000 // config.batch_size
    return config

"""CM3Leon-760M (Yu et al. 2023, table 3); otherwise like configs/cm3leon_350m.py.

python train.py --config configs/cm3leon_760m.py --set mesh.fsdp=64 accumulate=32
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("cm3leon_350m.py"))
    config.model.update({"layers": 24, "width": 1536, "heads": 16, "feed_forward": 4 * 1536})
    config.optim.learning_rate = 5e-4
    config.steps = int(1.9e12) // (config.batch_size * config.data.length)
    return config

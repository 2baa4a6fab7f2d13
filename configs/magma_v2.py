"""The second published checkpoint's settings (MAGMA_v2.yml of the original): adapters after MLP and attention.

    python train.py --config configs/magma_v2.py --set mesh.fsdp=16

It differs from the paper's models in its schedule: logarithmic warm-up, then linear decay to zero over 300,000 steps,
of which half are run. configs/magma_base.py describes how to prepare its weights and data.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("magma_base.py"))
    config.optim = {
        "learning_rate": 8e-4,
        "schedule": "warmup_decay",
        "warmup_steps": 100,
        "steps": 300_000,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "groups": {"encoder": {"learning_rate": 2e-6}},
    }
    config.steps = 150_000
    return config

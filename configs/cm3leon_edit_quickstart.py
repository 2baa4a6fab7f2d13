"""Finetunes the quick start on edits: two drawings that differ by skin tone, gender or hair alone.

python train.py --config configs/cm3leon_edit_quickstart.py
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("cm3leon_quickstart.py"))
    del config.weights
    config.base = "runs/cm3leon_quickstart"
    # Beside the sequence stands the drawing to change.
    config.data = ConfigDict(
        {
            "kind": "openmoji_edits",
            "length": 320,
            "spans": {"mean": 0.1, "rotation": 1.0},
            "beside": {"images": 2, "weights": (1.0, 0.0)},
        }
    )
    config.optim.update({"learning_rate": 1.5e-3, "warmup_steps": 20})
    config.steps = 250
    config.validation.every = 0
    return config

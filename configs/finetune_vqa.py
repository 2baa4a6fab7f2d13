"""MAGMA finetuned on VQAv2 (paper, table 2 and appendix A), with early stopping on the validation loss.

    python train.py --config configs/finetune_vqa.py --set mesh.fsdp=16

Starts from models/magma_long: the run of configs/magma_long.py, written out as a model folder.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("magma_long.py"))
    config.base = "models/magma_long"
    config.data.folders = {"train": ("data/vqa_train",), "validation": ("data/vqa_val",)}
    # Appendix A: pretraining's settings at lower rates. The validation interval and the patience are our choice.
    config.optim.learning_rate = 7e-4
    config.optim.groups.encoder.learning_rate = 1.5e-6
    config.steps = 10_000
    config.validation = {"every": 250, "samples": 4096, "patience": 4}
    return config

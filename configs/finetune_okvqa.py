"""MAGMA finetuned on OKVQA (paper, table 2 and appendix A), with early stopping on the validation loss.

    python train.py --config configs/finetune_okvqa.py --set mesh.fsdp=16

Starts from models/magma_long: the run of configs/magma_long.py, written out as a model folder.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("finetune_vqa.py"))
    config.data.folders = {"train": ("data/okvqa_train",), "validation": ("data/okvqa_val",)}
    return config

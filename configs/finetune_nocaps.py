"""MAGMA finetuned on NoCaps (paper, table 2 and appendix A), with early stopping on the validation loss.

    python train.py --config configs/finetune_nocaps.py --set mesh.fsdp=16

NoCaps has no training images; as its authors specify, the model trains on COCO captions and is evaluated on NoCaps.

Starts from models/magma_long: the run of configs/magma_long.py, written out as a model folder.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    return load_config_file(Path(__file__).with_name("finetune_coco.py"))

"""MAGMA finetuned on COCO Captions (paper, table 2 and appendix A), with early stopping on the validation loss.

    python train.py --config configs/finetune_coco.py --set mesh.fsdp=16

Starts from models/magma_long: the run of configs/magma_long.py, written out as a model folder.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("finetune_vqa.py"))
    # The paper's prompt for captions (section 4.1.2).
    captions = {"texts": "captions", "caption_prompt": "A picture of"}
    config.data.folders = {
        split: ({"path": f"data/coco_{name}", **captions},)
        for split, name in (("train", "train"), ("validation", "val"))
    }
    return config

"""MAGMA finetuned on SNLI-VE (paper, section 4.1.3 and appendix A): three classes, read from the last text token.

    python train.py --config configs/finetune_snli_ve.py --set mesh.fsdp=16

Starts from models/magma_long: the run of configs/magma_long.py, written out as a model folder; the classification
head is new.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("finetune_vqa.py"))
    config.model.classes = 3
    config.data.classes = ("entailment", "neutral", "contradiction")
    statements = {"texts": "questions", "question_prompt": "{}"}
    config.data.folders = {
        "train": ({"path": "data/snli_ve_train", **statements},),
        "validation": ({"path": "data/snli_ve_val", **statements},),
    }
    # Appendix A.
    config.optim.learning_rate = 3e-4
    return config

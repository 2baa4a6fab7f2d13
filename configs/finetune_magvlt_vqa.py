"""MAGVLT finetuned on VQAv2 (Kim et al. 2023, table 12): questions as classification on the token after BOT, no MixSel.

    python -m magma_jax.data encode data/vqa_train codes/vqa_train --tokenizer models/vqgan_imagenet_f16_16384.ckpt
    python -m magma_jax.data answers data/vqa_train data/vqa_answers.json --count 3129
    python train.py --config configs/finetune_magvlt_vqa.py --set mesh.fsdp=16
    python eval.py --workdir runs/finetune_magvlt_vqa --task vqav2 --data data/vqa_test

Starts from models/magvlt_base: the run of configs/magvlt_base.py, or the released checkpoint, as a model folder. The
paper's settings are not published; number of answers, learning rate, steps and patience are ours.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file

ANSWERS = Path("data/vqa_answers.json")


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("finetune_magvlt_coco.py"))
    config.data.folders = {"train": ("codes/vqa_train",), "validation": ("codes/vqa_val",)}
    # Without the file the run is refused, and the message says how it is written.
    config.data.classes = tuple(json.loads(ANSWERS.read_text())) if ANSWERS.is_file() else ()
    # As when it is asked, see ``Magvlt.answer``.
    config.data.clean_up = "none"
    config.model.classes = len(config.data.classes) or 3129
    config.loss.update({"unroll_weight": 0.0, "length_weight": 0.0})
    return config

"""MAGVLT finetuned to describe images, on COCO's captions (Kim et al. 2023, table 11): image to text alone, no MixSel.

    python -m magma_jax.data encode data/coco_train codes/coco_train --tokenizer models/vqgan_imagenet_f16_16384.ckpt
    python train.py --config configs/finetune_magvlt_coco.py --set mesh.fsdp=16
    python eval.py --workdir runs/finetune_magvlt_coco --task coco --data data/coco_test

Starts from models/magvlt_base: the run of configs/magvlt_base.py, or the released checkpoint, as a model folder. The
paper's settings are not published; learning rate, steps and patience are ours.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("magvlt_base.py"))
    config.base = "models/magvlt_base"
    config.weights = {}
    config.data.folders = {"train": ("codes/coco_train",), "validation": ("codes/coco_val",)}
    config.loss.update({"task_weights": (0.0, 1.0, 0.0), "mixsel_weight": 0.0})
    config.optim.update({"learning_rate": 1e-4, "warmup_steps": 500})
    config.steps = 10_000
    config.batch_size = 512
    config.accumulate = 1
    config.validation = {"every": 500, "samples": 4096, "patience": 4}
    return config

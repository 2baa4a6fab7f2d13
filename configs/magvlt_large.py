"""MAGVLT large (Kim et al. 2023): 40,000 steps of batch 4,096 on image-text pairs.

    python -m magma_jax.data encode data/cc3m codes/cc3m --tokenizer models/vqgan_imagenet_f16_16384.ckpt
    python train.py --config configs/magvlt_large.py --set mesh.fsdp=16

The first command encodes a dataset folder (docs/data.md), one for each of data.folders.

Sizes, losses and their weights are those of the released config and the paper. Neither states an optimizer; this one is
that of the DALL-E models.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("magvlt_base.py"))
    config.model.update({"layers": 36, "width": 1280, "heads": 10})
    config.accumulate = 8
    return config

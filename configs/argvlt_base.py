"""ARGVLT base (Kim et al. 2023): the autoregressive baseline of MAGVLT, of equal size, data and number of steps.

    python -m magma_jax.data encode data/cc3m codes/cc3m --tokenizer models/vqgan_imagenet_f16_16384.ckpt
    python train.py --config configs/argvlt_base.py --set mesh.fsdp=16

It learns to draw and to describe, token by token. The shares of both tasks are not stated; these are MAGVLT's, with the
joint task's share given to the texts.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("magvlt_base.py"))
    config.model.causal = True
    config.loss.update(
        {
            "task_weights": (8.0, 2.0, 0.0),
            "length_weight": 0.0,
            "unroll_weight": 0.0,
            "mixsel_weight": 0.0,
        }
    )
    # A step has one pass instead of three.
    config.accumulate = 2
    return config

"""The first published checkpoint's settings (MAGMA_v1.yml of the original): adapters after the MLPs, CC3M.

    python -m magma_jax.convert compose --lm EleutherAI/gpt-j-6b --encoder RN50x16.pt \\
        --config configs/magma_v1.py models/magma_v1
    python train.py --config configs/magma_v1.py --set mesh.fsdp=16
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("magma_v2.py"))
    config.model.mlp_adapter.downsample_factor = 4
    del config.model["attn_adapter"]
    config.data.folders = {"train": ("data/cc3m",), "validation": ("data/coco_val",)}
    config.validation.every = 100
    config.base = "models/magma_v1"
    return config

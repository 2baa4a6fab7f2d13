"""CM3Leon's image tokenizer: 1,024 codes of an image of 256 pixels, from a codebook of 8,192 (Gafni et al., 2022).

python -m magma_jax.data convert --from folder my_images data/images
python train.py --config configs/vqgan_f8.py
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file


def get_config() -> ConfigDict:
    config = load_config_file(Path(__file__).with_name("vqgan_f16.py"))
    config.model.update({"multipliers": (1, 1, 2, 4), "attention_sizes": (32,), "codes": 8192})
    return config

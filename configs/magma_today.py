"""MAGMA's recipe with a language model and an encoder of today: Llama 3.1, Qwen3 or Gemma 3 with SigLIP.

    python -m magma_jax.convert compose --lm hf://Qwen/Qwen3-8B --encoder hf://google/siglip-so400m-patch14-384 \\
        --config configs/magma_today.py:qwen3-8b models/qwen3-8b
    python train.py --config configs/magma_today.py:qwen3-8b --set mesh.fsdp=16

The language model and the encoder are frozen; prefix and adapters learn. SigLIP's 27 x 27 positions become 9 x 9 by
pixel shuffle. Data and schedule are MAGMA base's.
"""

from pathlib import Path

from ml_collections import ConfigDict

from magma_jax.config import load_config_file, to_dict
from magma_jax.models.language.catalog import PUBLISHED_LANGUAGE_MODELS
from magma_jax.models.vision.catalog import PUBLISHED_ENCODERS

ENCODER = "google/siglip-so400m-patch14-384"

# Hugging Face's name, and the token that its tokenizer puts before every text.
LANGUAGE_MODELS = {
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 128_000),
    "qwen3-8b": ("Qwen/Qwen3-8B", None),
    "gemma-3-12b": ("google/gemma-3-12b-pt", 2),
}


def get_config(name: str) -> ConfigDict:
    published, begin = LANGUAGE_MODELS[name]
    config = load_config_file(Path(__file__).with_name("magma_base.py"))
    config.model = config.model.to_dict() | {
        "lm": to_dict(PUBLISHED_LANGUAGE_MODELS[published]) | {"dtype": "bfloat16"},
        "encoder": to_dict(PUBLISHED_ENCODERS[ENCODER]),
        "prefix": {"mapping": "mlp", "shuffle": 3, "dropout": 0.1, "layernorm": True},
        "begin": begin,
    }
    config.optim.groups = {"encoder": "frozen"}
    # 256 positions, with 81 of the image and the last token not run.
    config.data.length = 176
    config.base = f"models/{name}"
    return config


get_config.__doc__ = f"language models: {', '.join(LANGUAGE_MODELS)}"

"""A language model and an image encoder by their names on the Hugging Face hub, and data of your own: docs/names.md.

    python -m magma_jax.convert compose --lm hf://Qwen/Qwen3-0.6B --encoder hf://google/siglip-base-patch16-224 \\
        --config configs/from_names.py:Qwen/Qwen3-0.6B+google/siglip-base-patch16-224 models/mine
    python train.py --config configs/from_names.py:Qwen/Qwen3-0.6B+google/siglip-base-patch16-224

Sizes, the vocabulary and the token before every text are read from the repositories, or from local folders in their
layout. Both models are frozen; prefix and adapters learn.
"""

import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from magma_jax.config import ConfigError, load_config_file, to_dict
from magma_jax.models.vision.catalog import EncoderConfig
from magma_jax.published.encoder_sources import read_encoder_config
from magma_jax.published.hf_config import read_config
from magma_jax.published.language_model_sources import read_tokenizer
from magma_jax.storage.hub import settings_folder
from magma_jax.storage.model_folder import MODEL_FILE, read_model_json

BASE = "models/mine"
# About as many positions an image gets, by pixel shuffle.
POSITIONS = 81


def get_config(names: str) -> ConfigDict:
    lm, plus, encoder = names.partition("+")
    if not (plus and lm and encoder):
        raise ConfigError(f"from_names: {names!r} are not two names; write {get_config.__doc__}")
    sources = {"lm": _source(lm), "image_prefix/encoder": _source(encoder)}
    config = load_config_file(Path(__file__).with_name("magma_base.py"))
    config.model = config.model.to_dict() | (_composed(sources) or _published(*sources.values()))
    config.optim.groups = {"encoder": "frozen"}
    config.optim.warmup_steps = 50
    config.data = {
        "kind": "folders",
        "folders": {
            split: ({"path": f"data/mine/{split}", "caption_prompt": "A picture of"},)
            for split in ("train", "validation", "test")
        },
        "length": 64,
    }
    config.base = BASE
    config.steps = 1000
    config.batch_size = 32
    config.checkpoint_every = 100
    config.validation = {"every": 100, "patience": 3}
    config.watch.samples_every = 100
    return config


get_config.__doc__ = "LANGUAGE_MODEL+ENCODER, such as Qwen/Qwen3-0.6B+google/siglip-base-patch16-224"


def _source(name: str) -> str:
    return name if Path(name).is_dir() else f"hf://{name}"


def _composed(sources: dict[str, str]) -> dict[str, Any] | None:
    """The model of ``BASE`` if it is composed from these sources: then the hub is not asked."""
    if not (Path(BASE) / MODEL_FILE).is_file():
        return None
    metadata = read_model_json(BASE)
    found = metadata.get("source", {})
    same = all(isinstance(found.get(part), dict) and found[part].get("from") == name for part, name in sources.items())
    return metadata["model"] if same else None


def _published(lm: str, encoder: str) -> dict[str, Any]:
    folder = settings_folder(lm)
    language_model, image_encoder = read_config(folder), read_encoder_config(settings_folder(encoder))
    return {
        "lm": to_dict(language_model) | {"dtype": "bfloat16"},
        "encoder": to_dict(image_encoder),
        "prefix": {"mapping": "mlp", "shuffle": _shuffle(image_encoder), "dropout": 0.1, "layernorm": True},
        "begin": read_tokenizer(folder, language_model).begin_id,
    }


def _shuffle(encoder: EncoderConfig) -> int:
    """Side of the squares of positions that become one, of those that divide the grid."""
    side = math.isqrt(encoder.positions or 1)
    sizes = [size for size in range(1, side + 1) if side % size == 0]
    return min(sizes, key=lambda size: abs(math.log((side // size) ** 2 / POSITIONS)))

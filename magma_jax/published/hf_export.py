"""The language model of a MAGMA model as Hugging Face lays it out, without its adapters."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.output import OutputError, whole_output
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.published.magma_checkpoint import open_model_folder
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.model_folder import nbytes_of
from magma_jax.storage.progress import writing
from magma_jax.storage.safetensors_file import write_safetensors


def to_hf(folder: str | Path, out: str | Path) -> None:
    """Writes ``config.json`` and ``model.safetensors``, which ``GPTJForCausalLM.from_pretrained(out)`` reads.

    Adapters have no place there and are left out. Hugging Face has one size of vocabulary, so the word table gets
    zeros for the rows that only the head has.

    Raises:
        OutputError: something already stands at ``out``, the disk is too small, or the language model is no GPT-J.
        CheckpointError: no model folder.
    """
    if Path(out).exists():
        raise OutputError(f"{out}: already exists; choose another name or remove it first")
    model = open_model_folder(folder)
    config = model.config.lm
    if not isinstance(config, GPTJConfig):
        raise OutputError(f"{folder}: its language model is a {config.kind}; only gptj can be written so far")
    params = {path.removeprefix("lm/"): leaf for path, leaf in model.params.items() if path.startswith("lm/")}
    plain = {path: leaf for path, leaf in params.items() if "_adapter/" not in path}
    if len(plain) < len(params):
        print(f"{out}: the adapters of {folder} are left out", file=sys.stderr)
    plain["wte/weight"] = _with_rows(plain["wte/weight"], config.head_rows)
    tensors = to_theirs(language_model_table(config), plain)
    nbytes = nbytes_of(tensors)
    with whole_output(out, nbytes=nbytes) as partial, writing(out, nbytes) as progress:
        partial.mkdir()
        dtype = np.dtype(plain["wte/weight"].dtype).name
        (partial / "config.json").write_text(json.dumps(_hf_config(config, dtype), indent=2) + "\n")
        write_safetensors(partial / "model.safetensors", tensors, {"format": "pt"}, progress)


def _hf_config(config: GPTJConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "vocab_size": config.head_rows,
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "rotary_dim": config.rotary_dim,
        "n_inner": config.feed_forward,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layernorm_eps,
        "tie_word_embeddings": False,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "dtype": dtype,
    }


def _with_rows(table: Any, rows: int) -> Any:
    have, width = table.shape
    if have >= rows:
        return table

    def read() -> np.ndarray:
        padded = np.zeros((rows, width), table.dtype)
        padded[:have] = table.read()
        return padded

    return Deferred((rows, width), table.dtype, read)

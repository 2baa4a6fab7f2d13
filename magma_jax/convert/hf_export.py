"""Exports the language model of a MAGMA model to Hugging Face's layout, without adapters."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.convert.open_folder import open_model_folder
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.output import OutputError, whole_output
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.model_folder import nbytes_of
from magma_jax.storage.progress import writing
from magma_jax.storage.safetensors_file import write_safetensors


def to_hf(folder: str | Path, out: str | Path) -> None:
    """Writes weights, config and vocabulary for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    The layout has no adapters, so they are omitted. It has a single vocabulary size, so the embedding table is padded
    with zeros to the rows of the head.

    Raises:
        OutputError: ``out`` already exists, the disk is too small, or the language model is not a GPT-J.
        CheckpointError: not a model folder.
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
        words = model.tokenizer
        special = {"bos_token_id": words.eos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
        _write_json(partial / "config.json", {**_hf_config(config, dtype), **special})
        _write_json(partial / "generation_config.json", special)
        _write_tokenizer(partial, words, config)
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
        "dtype": dtype,
    }


def _write_tokenizer(folder: Path, words: Tokenizer, config: GPTJConfig) -> None:
    content = json.loads(words.to_json())
    # Most models have no row for the image token, so its id would be out of range.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < config.head_rows]
    _write_json(folder / "tokenizer.json", content)
    settings = {
        # Uses tokenizer.json unchanged; GPT2TokenizerFast would rebuild it from its parts.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), words.eos),
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # required for batched generation
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_rows(table: Any, rows: int) -> Any:
    have, width = table.shape
    if have >= rows:
        return table

    def read() -> np.ndarray:
        padded = np.zeros((rows, width), table.dtype)
        padded[:have] = table.read()
        return padded

    return Deferred((rows, width), table.dtype, read)

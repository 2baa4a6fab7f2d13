"""Exports a language model, alone or that of a MAGMA model without adapters, to Hugging Face's layout."""

import json
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np

from magma_jax.convert.open_folder import open_checkpoint, open_model_folder
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.data.tokenizers.settings import CHAT_TEMPLATE_FILE, GENERATION_FILE, SETTINGS_FILE
from magma_jax.families import family_of_checkpoint
from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.nn.adapters import is_adapter
from magma_jax.output import OutputError, whole_output
from magma_jax.published.hf.write import to_hf_config
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.published.open_magma import load_tokenizer
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.model_folder import nbytes_of
from magma_jax.storage.progress import writing
from magma_jax.storage.safetensors_file import write_safetensors
from magma_jax.typing import Params


def to_hf(folder: str | Path, out: str | Path) -> None:
    """Writes weights, config and vocabulary for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    The layout has no adapters, so they are omitted. It has a single vocabulary size, so the embedding table is padded
    with zeros to the rows of the head. A tied head is stored once.

    Args:
        folder: run folder or model folder of a language model or of MAGMA.
        out: the folder to write.

    Raises:
        OutputError: ``out`` already exists, or the disk is too small.
        CheckpointError: not a model folder, or one of another family.
    """
    if Path(out).exists():
        raise OutputError(f"{out}: already exists; choose another name or remove it first")
    config, params, words = _open_language_model(Path(folder))
    plain = {path: leaf for path, leaf in params.items() if not is_adapter(path)}
    if len(plain) < len(params):
        print(f"{out}: the adapters of {folder} are left out", file=sys.stderr)
    plain["wte/weight"] = _with_rows(plain["wte/weight"], config.head_rows)
    tensors = to_theirs(language_model_table(config), plain)
    if config.head == "tied":
        tensors = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    nbytes = nbytes_of(tensors)
    with whole_output(out, nbytes=nbytes) as partial, writing(out, nbytes) as progress:
        partial.mkdir()
        dtype = np.dtype(plain["wte/weight"].dtype).name
        begin = words.eos_id if words.begin_id is None else words.begin_id
        ends = list(words.end_ids) if len(words.end_ids) > 1 else words.eos_id
        special = {"bos_token_id": begin, "eos_token_id": ends, "pad_token_id": words.pad_id}
        _write_json(partial / "config.json", {**to_hf_config(config), "dtype": dtype, **special})
        _write_json(partial / GENERATION_FILE, special)
        _write_tokenizer(partial, words, config)
        write_safetensors(partial / "model.safetensors", tensors, {"format": "pt"}, progress)


def _open_language_model(folder: Path) -> tuple[LanguageModelConfig, Params, Tokenizer]:
    if set(family_of_checkpoint(folder).configs) <= set(get_args(LanguageModelConfig)):
        alone = open_checkpoint(folder)
        return alone.config, alone.params, load_tokenizer(folder)
    model = open_model_folder(folder)
    own = {path.removeprefix("lm/"): leaf for path, leaf in model.params.items() if path.startswith("lm/")}
    return model.config.lm, own, model.tokenizer


def _write_tokenizer(folder: Path, words: Tokenizer, config: LanguageModelConfig) -> None:
    content = json.loads(words.to_json())
    # Most models have no row for the image token, so its id would be out of range.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < config.head_rows]
    _write_json(folder / "tokenizer.json", content)
    published = words.settings_to_save
    names = {"bos_token": words.begin or words.eos, **published.special, "eos_token": words.eos}
    settings = {
        # Uses tokenizer.json unchanged; GPT2TokenizerFast would rebuild it from its parts.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("pad_token", "unk_token"), words.eos),
        **names,
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # required for batched generation
    }
    _write_json(folder / SETTINGS_FILE, settings)
    if published.chat_template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(published.chat_template, encoding="utf-8", newline="")


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

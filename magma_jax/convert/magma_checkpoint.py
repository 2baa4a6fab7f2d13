"""Converts MAGMA checkpoints between the published PyTorch layout and model folders, bit for bit."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.config import to_dict
from magma_jax.convert.open_folder import open_model_folder
from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer
from magma_jax.foreign import MAX_TEXT_NBYTES, check_tree, shown
from magma_jax.models.magma import MagmaConfig
from magma_jax.published.keymap import engine as keymap
from magma_jax.published.keymap.rules import Rule
from magma_jax.published.magma_keys import attention_buffers, is_weight, magma_table
from magma_jax.published.open_magma import (
    CONFIG_KEY,
    SETTINGS_KEY,
    TOKENIZER_KEY,
    OpenMagma,
    check_vocabulary,
    open_torch_magma,
)
from magma_jax.storage.deferred import alias_key
from magma_jax.storage.hashing import hashing
from magma_jax.storage.model_folder import BUFFER_FILE, TORCH_FILE, CheckpointError, nbytes_of, write_model_folder
from magma_jax.storage.progress import writing
from magma_jax.storage.safetensors_file import write_safetensors
from magma_jax.storage.torch.writer import write_torch_file
from magma_jax.version import __version__


def published_module(model: OpenMagma) -> dict[str, Any]:
    """All tensors of a model under the published keys, aliases and buffers included, in the source's order."""
    buffers = attention_buffers(model.config, np.dtype(model.params["lm/wte/weight"].dtype))
    table = magma_table(model.config, buffers)
    module = keymap.to_theirs(table, model.params)
    for key, array in model.source.get("buffers", {}).items():
        module |= {name: array for name in (key, _second_name(key)) if name in module}
    if "keys" in model.source:
        # Aliases and buffers that the source lacked are not added.
        order = {key: i for i, key in enumerate(model.source["keys"])}
        module = {key: tensor for key, tensor in module.items() if key in order or is_weight(key)}
        module = dict(sorted(module.items(), key=lambda item: order.get(item[0], len(order))))
    return module


def from_torch(
    checkpoint: str | Path,
    out: str | Path,
    model_config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> MagmaConfig:
    """Converts a checkpoint in the published layout to a model folder; a mismatch raises before anything is written.

    Tensors are converted one at a time, in file order and in the file's dtypes.

    Args:
        checkpoint: see ``open_torch_magma``.
        out: the model folder; must not exist.
        model_config: values that cannot be inferred from tensors, see ``published.infer_config``.
        tokenizer: the model's vocabulary; default: the file's own if it has one, else GPT-2's, as in the published
            models.

    Raises:
        CheckpointError: ``out`` already exists, or the disk is too small. Also the errors of ``open_torch_magma``.
    """
    if Path(out).exists():  # checked again before writing; this check comes before reading 12 GB
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    with open_torch_magma(checkpoint, model_config) as model:
        source = model.source
        counters = {key: value for key, value in source["counters"].items() if is_json(value)}
        dropped = sorted(set(source["counters"]) - set(counters), key=str)
        if dropped:
            print(f"{checkpoint}: dropped, not weights: {', '.join(map(shown, dropped[:20]))}", file=sys.stderr)

        words = tokenizer or model.tokenizer
        check_vocabulary(checkpoint, words, model.config)

        def extras(folder: Path) -> None:
            words.save(folder / "tokenizer")
            np.savez_compressed(folder / BUFFER_FILE, **source["buffers"])
            (folder / TORCH_FILE).write_text(json.dumps({"counters": counters, "keys": source["keys"]}))

        with hashing(model.files) as digest_of, writing(out, nbytes_of(model.params)) as progress:

            def metadata() -> dict[str, Any]:
                sums = {file.name: digest_of(file) for file in model.files}
                return {
                    "model": to_dict(model.config),
                    "source": {"file": Path(checkpoint).name, "sha256": sums},
                    "magma_jax": __version__,
                }

            write_model_folder(out, metadata, model.params, extras, progress)
    return model.config


def to_torch(folder: str | Path, checkpoint: str | Path) -> None:
    """Writes a model folder as a PyTorch checkpoint in the published layout, layer by layer.

    Raises:
        FileExistsError: ``checkpoint`` already exists. CheckpointError: not a model folder. OutputError: the disk is
            too small.
    """
    absent(checkpoint)
    model = open_model_folder(folder)
    module = published_module(model)
    if model.tokenizer.to_json() != gpt2_tokenizer().to_json():
        print(
            f"{checkpoint}: cannot hold the vocabulary of {folder}, which is not GPT-2's; from-torch takes it by "
            f"--tokenizer {Path(folder) / 'tokenizer'}",
            file=sys.stderr,
        )
    with writing(checkpoint, nbytes_of({alias_key(tensor): tensor for tensor in module.values()})) as progress:
        write_torch_file(checkpoint, {"module": module, **model.source.get("counters", {})}, progress)


def to_safetensors(folder: str | Path, out: str | Path) -> None:
    """Writes a model folder as one safetensors file with the published keys, without buffers and aliases.

    The file's metadata holds the config, and the vocabulary unless it is GPT-2's, so that ``open_torch_magma`` needs
    no other file. Raises as ``to_torch``.
    """
    absent(out)
    model = open_model_folder(folder)
    rules = [entry for entry in magma_table(model.config) if isinstance(entry, Rule)]
    tensors = keymap.to_theirs(rules, model.params)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(to_dict(model.config)), "magma_jax": __version__}
    if (words := model.tokenizer.to_json()) != gpt2_tokenizer().to_json():
        metadata |= {TOKENIZER_KEY: words, SETTINGS_KEY: model.tokenizer.settings_to_save.as_json()}
    with writing(out, nbytes_of(tensors)) as progress:
        write_safetensors(out, tensors, metadata, progress)


def absent(path: str | Path) -> None:
    """Raises FileExistsError if there is something at ``path``."""
    if Path(path).exists():
        raise FileExistsError(f"{path}: already exists; choose another name or remove it first")


def is_json(value: object) -> bool:
    """Whether an extra value of a checkpoint can be stored as JSON: bounded, and valid Unicode."""
    try:
        check_tree(value)
        text = json.dumps(value, ensure_ascii=False)
        return len(text.encode()) <= MAX_TEXT_NBYTES and json.loads(text) == value
    except (TypeError, ValueError):
        return False


def _second_name(key: str) -> str:
    return key.replace("lm.transformer.h.", "transformer.", 1)

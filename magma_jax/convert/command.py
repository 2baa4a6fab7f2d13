"""Subcommands of ``python -m magma_jax.convert``."""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

from magma_jax.config import apply_overrides, load_config_file
from magma_jax.convert.changes.lora import add_lora, merge_lora, remove_lora, to_peft
from magma_jax.convert.changes.quantize import quantize_folder
from magma_jax.convert.check_folder import add_checksums, check_folder
from magma_jax.convert.compare import compare_checkpoints
from magma_jax.convert.compose import compose
from magma_jax.convert.hf_export import to_hf
from magma_jax.convert.layouts import layout_of, layout_of_weights
from magma_jax.convert.magma_checkpoint import to_safetensors
from magma_jax.convert.sharing.export import export
from magma_jax.convert.sharing.trained import export_trained, put_on
from magma_jax.convert.verify import read_model_config, verify
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.families import run_config
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import CARD_FILE
from magma_jax.storage.objects.copies import local_copy, new_folder


def _from_torch(options: argparse.Namespace) -> int:
    model_config = read_model_config(options.model_config) if options.model_config else None
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    checkpoint = local_path(options.checkpoint)
    layout = layout_of_weights(checkpoint)
    with new_folder(options.out) as out:
        made = layout.from_torch(checkpoint, out, model_config, tokenizer)
    print(f"{options.out}: {made}")
    return 0


def _to_torch(folder: Path, out: Path) -> None:
    layout_of(folder).to_torch(folder, out)


def _compose(options: argparse.Namespace) -> int:
    config = run_config(apply_overrides(load_config_file(options.config), options.set))
    made = compose(config, options.lm, options.encoder, options.out)
    print(f"{options.out}: {made.trainable:,} parameters learn ({made.fresh:,} are fresh), {made.frozen:,} are frozen")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    with new_folder(options.out) as out:
        quantize_folder(local_copy(options.folder), out, options.to)
    print(f"{options.out}: language model in {options.to}")
    return 0


def _export(function: Callable[[Path, Path], None], options: argparse.Namespace) -> int:
    with new_folder(options.out) as out:
        function(local_copy(options.folder), out)
    print(f"{options.out}: written")
    return 0


def _from_peft(options: argparse.Namespace) -> int:
    with new_folder(options.out) as out:
        lora = add_lora(local_copy(options.folder), local_copy(options.adapter), out)
    print(f"{options.out}: LoRA of rank {lora.rank} at {', '.join(lora.targets)}")
    return 0


def _export_folder(options: argparse.Namespace) -> int:
    folder = local_copy(options.folder)
    with new_folder(options.out) as out:
        if options.trained:
            count = export_trained(folder, out, ema=options.ema)
            said = f"{count:,} parameters, to be put on the frozen ones with convert put-on"
        else:
            count = sum(export(folder, out, options.to, ema=options.ema).values())
            said = f"{count:,} parameters, and a model card to complete in {CARD_FILE}"
    print(f"{options.out}: {said}")
    return 0


def _put_on(options: argparse.Namespace) -> int:
    count = put_on(options.file, options.base, options.out)
    print(f"{options.out}: {count:,} parameters, the others are those of {options.base}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    if (options.other is not None) + (options.golden is not None) + options.checksums != 1:
        raise ValueError("verify takes either two checkpoints, or one and --golden FILE.npz, or one and --checksums")
    if options.checksums:
        result = check_folder(local_copy(options.checkpoint, optimizer=True))
    elif options.other is not None:
        result = compare_checkpoints(local_path(options.checkpoint), local_path(options.other), options.tolerance)
    else:
        model_config = read_model_config(options.model_config) if options.model_config else None
        result = verify(local_path(options.checkpoint), options.golden, model_config)
    print(json.dumps(result.as_json(), indent=2) if options.json else result.as_table())
    return 0 if result.ok else 1


def _add_checksums(options: argparse.Namespace) -> int:
    add_checksums(options.folder)
    print(f"{options.folder}: checksums of the current files written")
    return 0


# Functions by subcommand; each returns the exit status.
RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "from-torch": _from_torch,
    "to-torch": functools.partial(_export, _to_torch),
    "to-safetensors": functools.partial(_export, to_safetensors),
    "to-hf": functools.partial(_export, to_hf),
    "merge-lora": functools.partial(_export, merge_lora),
    "remove-lora": functools.partial(_export, remove_lora),
    "to-peft": functools.partial(_export, to_peft),
    "from-peft": _from_peft,
    "export": _export_folder,
    "put-on": _put_on,
    "quantize": _quantize,
    "compose": _compose,
    "verify": _verify,
    "add-checksums": _add_checksums,
}

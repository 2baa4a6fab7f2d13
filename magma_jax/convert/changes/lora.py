"""LoRA of model folders and runs: merged into the matrices, removed, and from and to PEFT's layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.config import QUANTIZED, ConfigError, to_dict
from magma_jax.convert.open_folder import open_model_folder
from magma_jax.models.magma import MagmaConfig
from magma_jax.nn.lora import LoraConfig
from magma_jax.output import whole_output
from magma_jax.published.hf.peft import read_lora, write_lora
from magma_jax.published.open_magma import OpenMagma
from magma_jax.storage.deferred import Deferred, read_array, read_row
from magma_jax.storage.model_folder import BASE, CheckpointError, nbytes_of, read_model_json, write_model_folder
from magma_jax.storage.progress import writing
from magma_jax.version import __version__

_LM = "lm/"


def merge_lora(folder: str | Path, out: str | Path) -> None:
    """Copies a model folder or a trained run with its LoRA added to the matrices, which then are the model's own.

    The sums are computed in fp64 and rounded once to the dtype of the matrices. Layers are processed one at a time.

    Raises:
        CheckpointError: ``out`` exists, the disk is too small, ``folder`` is no model folder or has no LoRA, or its
            matrices are quantized.
    """
    model, lora = _open(folder, out)
    if model.config.lm.dtype in QUANTIZED:
        raise CheckpointError(
            f"{folder}: its matrices are in {model.config.lm.dtype}, to which nothing can be added exactly; merge into "
            "the model that was quantized"
        )
    params = dict(_without_lora(model.params))
    for path in model.params:
        if path.endswith("/lora/down/weight"):
            name = path.removesuffix("/lora/down/weight")
            factors = (model.params[f"{name}/lora/up/weight"], model.params[path])
            params[f"{name}/weight"] = _merged(params[f"{name}/weight"], *factors, lora.scale)
    _write(folder, out, dataclasses.replace(model.config, lora=None), params, model, "merged LoRA")


def remove_lora(folder: str | Path, out: str | Path) -> None:
    """Copies a model folder or a trained run without its LoRA; every other parameter keeps its bits.

    Raises:
        CheckpointError: ``out`` exists, the disk is too small, or ``folder`` is no model folder or has no LoRA.
    """
    model, _ = _open(folder, out)
    _write(
        folder, out, dataclasses.replace(model.config, lora=None), _without_lora(model.params), model, "removed LoRA"
    )


def add_lora(folder: str | Path, adapter: str | Path, out: str | Path) -> LoraConfig:
    """Copies a model folder with a LoRA in PEFT's layout; returns its config.

    Raises:
        CheckpointError: ``out`` exists, the disk is too small, or ``folder`` is no model folder or has a LoRA.
        PeftError: ``adapter`` is no LoRA of this language model.
    """
    _absent(out)
    model = open_model_folder(folder)
    if model.config.lora is not None:
        raise CheckpointError(f"{folder}: has a LoRA already; merge or remove it first")
    lora, params = read_lora(adapter, model.config.lm)
    try:
        config = dataclasses.replace(model.config, lora=lora)
    except ValueError as error:
        raise ConfigError(f"{adapter}: {error}") from None
    added = {f"{_LM}{path}": array for path, array in params.items()}
    _write(folder, out, config, {**model.params, **added}, model, f"LoRA of {Path(adapter).name}")
    return lora


def to_peft(folder: str | Path, out: str | Path) -> None:
    """Writes the LoRA of a model folder or a trained run as a folder in PEFT's layout.

    Raises:
        CheckpointError: ``out`` exists, the disk is too small, or ``folder`` is no model folder or has no LoRA.
    """
    model, lora = _open(folder, out)
    params = {path.removeprefix(_LM): leaf for path, leaf in model.params.items() if "/lora/" in path}
    with whole_output(out, nbytes=nbytes_of(params)) as partial:
        partial.mkdir()
        write_lora(partial, model.config.lm, lora, params)


def _absent(out: str | Path) -> None:
    if Path(out).exists():
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")


def _open(folder: str | Path, out: str | Path) -> tuple[OpenMagma, LoraConfig]:
    _absent(out)
    model = open_model_folder(folder)
    if model.config.lora is None:
        raise CheckpointError(f"{folder}: has no LoRA (model.lora is not set)")
    return model, model.config.lora


def _without_lora(params: Mapping[str, Any]) -> dict[str, Any]:
    return {path: leaf for path, leaf in params.items() if "/lora/" not in path}


def _merged(weight: Any, up: Any, down: Any, scale: float) -> Deferred:
    """The sum of a stack of matrices (L, out, in) and scaled products of (L, out, rank) and (L, rank, in)."""
    dtype, layers = np.dtype(weight.dtype), weight.shape[0]

    def row(i: int) -> np.ndarray:
        own, left, right = (np.asarray(read_row(part, i), np.float64) for part in (weight, up, down))
        return (own + scale * (left @ right)).astype(dtype)

    def deferred(i: int) -> Deferred:
        return Deferred(weight.shape[1:], dtype, lambda: row(i))

    rows = tuple(map(deferred, range(layers)))
    return Deferred(weight.shape, dtype, lambda: np.stack([read_array(part) for part in rows]), rows)


def _write(
    folder: str | Path, out: str | Path, config: MagmaConfig, params: Mapping[str, Any], model: OpenMagma, source: str
) -> None:
    # A run's data config is kept, so that the copy can be evaluated on the same split.
    metadata = {name: value for name, value in read_model_json(folder).items() if name != BASE}
    made_from = {"from": Path(folder).name, "change": source}
    metadata |= {"model": to_dict(config), "source": made_from, "magma_jax": __version__}
    if "run" in metadata:
        metadata["run"] |= {"model": metadata["model"]}
    with writing(out, nbytes_of(params)) as progress:
        write_model_folder(out, metadata, params, lambda made: model.tokenizer.save(made / "tokenizer"), progress)

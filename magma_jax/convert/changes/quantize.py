"""Quantizes the language model matrices of a model folder to 8 or 4 bits."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from magma_jax.config import to_dict
from magma_jax.convert.open_folder import open_model_folder
from magma_jax.families import family_of_checkpoint
from magma_jax.families.cm3leon.loading import open_folder
from magma_jax.nn.quantized import QUANTIZED, quantize
from magma_jax.published.open_cm3leon import cm3leon_shapes
from magma_jax.published.open_magma import abstract_model, load_tokenizer
from magma_jax.storage.deferred import Deferred, read_array, read_row
from magma_jax.storage.model_folder import BASE, CheckpointError, nbytes_of, read_model_json, write_model_folder
from magma_jax.storage.progress import writing
from magma_jax.version import __version__

_quantize = jax.jit(quantize, static_argnums=1)


def quantize_folder(folder: str | Path, out: str | Path, dtype: str) -> None:
    """Copies a model folder or a trained run with its language model's matrices in ``int8`` or ``int4``.

    Everything else is copied unchanged; adapters, embeddings and image tokenizers are not quantized. Layers are
    processed one at a time.

    Raises:
        CheckpointError: ``out`` already exists, the disk is too small, or ``folder`` is not a model folder or already
            quantized.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    model = _open(folder, dtype)
    if model.dtype in QUANTIZED:
        raise CheckpointError(f"{folder}: its language model is in {model.dtype} already")
    params: dict[str, Any] = {}
    for path, shape in model.shapes.items():
        name, _, kind = path.rpartition("/")
        if kind == "weight" and f"{path}_scale" in model.shapes:
            params[path] = _deferred(model.params[path], shape, dtype, 0)
        elif kind == "weight_scale":
            params[path] = _deferred(model.params[f"{name}/weight"], shape, dtype, 1)
        else:
            params[path] = model.params[path]
    # A run's data config is kept, so that the copy can be evaluated on the same split.
    metadata = {name: value for name, value in read_model_json(folder).items() if name != BASE}
    metadata |= {"model": to_dict(model.config), "source": {"quantized": folder.name}, "magma_jax": __version__}
    if "run" in metadata:
        metadata["run"] |= {"model": metadata["model"]}
    with writing(out, nbytes_of(params)) as progress:
        write_model_folder(out, metadata, params, lambda made: model.tokenizer.save(made / "tokenizer"), progress)


class _Opened(NamedTuple):
    """A model to quantize.

    Attributes:
        dtype: dtype of its language model.
        params: its parameters, lazy where possible.
        tokenizer: of its texts.
        config: its config with the new dtype.
        shapes: shapes of the parameters that this one has.
    """

    dtype: str
    params: Mapping[str, Any]
    tokenizer: Any
    config: Any
    shapes: Mapping[str, Any]


def _open(folder: Path, dtype: str) -> _Opened:
    if family_of_checkpoint(folder).name == "cm3leon":
        config, params = open_folder(folder)
        changed = dataclasses.replace(config, dtype=dtype)
        return _Opened(config.dtype, params, load_tokenizer(folder), changed, cm3leon_shapes(changed))
    model = open_model_folder(folder)
    lm = model.config.lm
    config = dataclasses.replace(model.config, lm=dataclasses.replace(lm, dtype=dtype))
    return _Opened(lm.dtype, model.params, model.tokenizer, config, abstract_model(config)[0])


def _deferred(weight: Any, shape: jax.ShapeDtypeStruct, dtype: str, part: int) -> Deferred:
    """Integers (part 0) or scales (part 1) of a matrix or a stack of matrices."""

    def quantized(read: Callable[[], np.ndarray]) -> np.ndarray:
        return np.asarray(_quantize(read(), dtype)[part])

    def row(i: int) -> Deferred:
        return Deferred(shape.shape[1:], np.dtype(shape.dtype), lambda: quantized(lambda: read_row(weight, i)))

    rows = tuple(map(row, range(shape.shape[0]))) if len(shape.shape) > 2 else ()
    return Deferred(shape.shape, np.dtype(shape.dtype), lambda: quantized(lambda: read_array(weight)), rows)

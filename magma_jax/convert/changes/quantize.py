"""Quantizes the language model matrices of a model folder to 8 or 4 bits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from magma_jax.config import to_dict
from magma_jax.convert.open_folder import open_model_folder
from magma_jax.nn.quantized import QUANTIZED, quantize
from magma_jax.published.open_magma import abstract_model
from magma_jax.storage.deferred import Deferred, read_array, read_row
from magma_jax.storage.model_folder import BASE, CheckpointError, nbytes_of, read_model_json, write_model_folder
from magma_jax.storage.progress import writing
from magma_jax.version import __version__

_quantize = jax.jit(quantize, static_argnums=1)


def quantize_folder(folder: str | Path, out: str | Path, dtype: str) -> None:
    """Copies a model folder or a trained run with its language model's matrices in ``int8`` or ``int4``.

    Everything else is copied unchanged; adapters are not quantized. Layers are processed one at a time.

    Raises:
        CheckpointError: ``out`` already exists, the disk is too small, or ``folder`` is not a model folder or already
            quantized.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    model = open_model_folder(folder)
    if model.config.lm.dtype in QUANTIZED:
        raise CheckpointError(f"{folder}: its language model is in {model.config.lm.dtype} already")
    config = dataclasses.replace(model.config, lm=dataclasses.replace(model.config.lm, dtype=dtype))
    shapes, _ = abstract_model(config)
    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        name, _, kind = path.rpartition("/")
        if kind == "weight" and f"{path}_scale" in shapes:
            params[path] = _deferred(model.params[path], shape, dtype, 0)
        elif kind == "weight_scale":
            params[path] = _deferred(model.params[f"{name}/weight"], shape, dtype, 1)
        else:
            params[path] = model.params[path]
    # A run's data config is kept, so that the copy can be evaluated on the same split.
    metadata = {name: value for name, value in read_model_json(folder).items() if name != BASE}
    metadata |= {"model": to_dict(config), "source": {"quantized": folder.name}, "magma_jax": __version__}
    if "run" in metadata:
        metadata["run"] |= {"model": metadata["model"]}
    with writing(out, nbytes_of(params)) as progress:
        write_model_folder(out, metadata, params, lambda made: model.tokenizer.save(made / "tokenizer"), progress)


def _deferred(weight: Any, shape: jax.ShapeDtypeStruct, dtype: str, part: int) -> Deferred:
    """Integers (part 0) or scales (part 1) of a matrix or a stack of matrices."""

    def quantized(read: Callable[[], np.ndarray]) -> np.ndarray:
        return np.asarray(_quantize(read(), dtype)[part])

    def row(i: int) -> Deferred:
        return Deferred(shape.shape[1:], np.dtype(shape.dtype), lambda: quantized(lambda: read_row(weight, i)))

    rows = tuple(map(row, range(shape.shape[0]))) if len(shape.shape) > 2 else ()
    return Deferred(shape.shape, np.dtype(shape.dtype), lambda: quantized(lambda: read_array(weight)), rows)

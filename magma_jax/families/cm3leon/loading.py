"""Loading a CM3Leon checkpoint: a run folder or a model folder."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from magma_jax.config import from_dict
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.families.cm3leon.config import SHARDINGS
from magma_jax.foreign import shown
from magma_jax.models.cm3leon import CM3Leon, CM3LeonConfig
from magma_jax.nn.modules import Definition, abstract
from magma_jax.published.open_magma import load_tokenizer
from magma_jax.runtime.sharding import parameter_shardings, placed
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import CheckpointError, in_dtype, read_model_json
from magma_jax.training.checkpoints.checkpoint import read_trained_params
from magma_jax.typing import Params


class Loaded(NamedTuple):
    """A loaded model.

    Attributes:
        config: its config.
        graphdef: its definition.
        params: its weights on their devices.
        tokenizer: its text tokenizer.
        saw_sentinels: whether its training data had sentinels; true if unknown.
    """

    config: CM3LeonConfig
    graphdef: Definition
    params: Params
    tokenizer: Tokenizer
    saw_sentinels: bool


def load_cm3leon(
    path: str | Path, dtype: str | None = None, mesh: Mesh | None = None, ema: bool | None = None
) -> Loaded:
    """Loads a run folder or a model folder; arguments and errors as for ``CM3LeonGenerator.from_checkpoint``."""
    path = local_path(path)
    metadata = read_model_json(path)
    config = read_cm3leon_config(path)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    graphdef, shapes, types = abstract(lambda: CM3Leon(config, rngs=nnx.Rngs(0)))
    shapes = in_dtype(shapes, jnp.dtype(config.dtype))
    if mesh is not None:
        shapes = placed(shapes, parameter_shardings(shapes, mesh, SHARDINGS))
    params = read_trained_params(path, shapes, types, ema=ema)
    data = (metadata.get("run") or {}).get("data") or {}
    return Loaded(config, graphdef, params, load_tokenizer(path), data.get("spans", True) is not None)


def read_cm3leon_config(folder: str | Path) -> CM3LeonConfig:
    """Reads the config of a model folder or run.

    Raises:
        CheckpointError: no such folder, or a model of another kind. ConfigError: an invalid config.
    """
    model = read_model_json(folder)["model"]
    if not isinstance(model, dict) or model.get("kind") != "cm3leon":
        kind = model.get("kind", "magma") if isinstance(model, dict) else model
        raise CheckpointError(f"{folder}: holds a model of kind {shown(kind)}, but a cm3leon is wanted here")
    return from_dict(CM3LeonConfig, model, "model.json: model")

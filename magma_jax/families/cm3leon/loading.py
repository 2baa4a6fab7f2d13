"""Loading a CM3Leon checkpoint: a run folder, a model folder, or a file in OPT's or metaseq's layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from magma_jax.config import QUANTIZED, from_dict
from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer
from magma_jax.families.cm3leon.config import SHARDINGS
from magma_jax.foreign import shown
from magma_jax.models.cm3leon import CM3LeonConfig, CM3LeonModel
from magma_jax.nn.modules import Definition, abstract
from magma_jax.published.open_cm3leon import open_torch_cm3leon
from magma_jax.published.open_magma import load_tokenizer
from magma_jax.runtime.sharding import parameter_shardings, parameter_spec, placed
from magma_jax.storage.files import holds_weights
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import MODEL_FILE, CheckpointError, in_dtype, open_params, read_model_json
from magma_jax.training.checkpoints.checkpoint import open_trained_params, read_trained_params
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
    """Loads a checkpoint; arguments and errors as for ``CM3Leon.from_checkpoint``."""
    path = local_path(path)
    is_file = not (path / MODEL_FILE).exists() and holds_weights(path)
    config, params = read_cm3leon(path, dtype, mesh=mesh, ema=ema)
    graphdef = abstract(lambda: CM3LeonModel(config, rngs=nnx.Rngs(0)))[0]
    if is_file:
        return Loaded(config, graphdef, params, gpt2_tokenizer(), True)
    data = (read_model_json(path).get("run") or {}).get("data") or {}
    return Loaded(config, graphdef, params, load_tokenizer(path), data.get("spans", True) is not None)


def read_cm3leon(
    path: str | Path,
    dtype: str | None = None,
    model_config: Mapping[str, Any] | None = None,
    *,
    mesh: Mesh | None = None,
    ema: bool | None = None,
    any_vocabulary: bool = False,
) -> tuple[CM3LeonConfig, Params]:
    """Config and weights on their devices.

    ``model_config`` and ``any_vocabulary`` are those of ``open_torch_cm3leon``; the rest as for ``load_cm3leon``.
    """
    path = Path(path)
    if dtype in QUANTIZED:
        raise CheckpointError(
            f"{path}: weights in {dtype} are made by python -m magma_jax.convert quantize; open those"
        )
    if not (path / MODEL_FILE).exists() and holds_weights(path):
        dtype = dtype or "float32"
        with open_torch_cm3leon(path, model_config, dtype, any_vocabulary=any_vocabulary) as model:
            params = {name: _place(name, tensor.read(), mesh) for name, tensor in model.params.items()}
            return dataclasses.replace(model.config, dtype=dtype), params
    config = read_cm3leon_config(path)
    if config.dtype in QUANTIZED:
        # The matrices stay as they are; the rest has the dtype that it is stored in, and gives that of activations.
        others = dtype or open_params(path)["wte/weight"].dtype
    else:
        others = dtype or config.dtype
        config = dataclasses.replace(config, dtype=others)
    _, shapes, types = abstract(lambda: CM3LeonModel(config, rngs=nnx.Rngs(0)))
    shapes = in_dtype(shapes, jnp.dtype(others))
    if mesh is not None:
        shapes = placed(shapes, parameter_shardings(shapes, mesh, SHARDINGS))
    return config, read_trained_params(path, shapes, types, ema=ema)


def open_folder(folder: str | Path) -> tuple[CM3LeonConfig, Params]:
    """Config, and a tensor for every parameter in its stored dtype, lazy unless a run has trained it.

    Raises:
        CheckpointError: not such a folder, or a damaged one.
    """
    config = read_cm3leon_config(folder)
    _, shapes, types = abstract(lambda: CM3LeonModel(config, rngs=nnx.Rngs(0)))
    return config, open_trained_params(folder, shapes, types)


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


def _place(name: str, array: Any, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(array)
    return jax.device_put(array, NamedSharding(mesh, parameter_spec(name, array.shape, mesh, SHARDINGS)))

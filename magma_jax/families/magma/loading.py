"""Loading a MAGMA checkpoint: run folder, model folder, or a file in the published layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.models.magma import SHARDINGS, MagmaConfig, MagmaModel
from magma_jax.nn.modules import abstract
from magma_jax.published.open_magma import load_tokenizer, read_magma_config, read_torch_magma
from magma_jax.runtime.sharding import parameter_shardings, parameter_spec, placed
from magma_jax.storage.files import holds_weights
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import MODEL_FILE, in_dtype
from magma_jax.training.checkpoints.checkpoint import read_trained_params
from magma_jax.typing import Array, Params

# Size of the layer stack from which it is unstacked: smaller ones stay in CPU caches, where copying costs little.
_APART_NBYTES = 128 * 2**20

LAYERS = "lm/layers/"


def load_magma(
    path: str | Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    model_config: Mapping[str, Any] | None = None,
    ema: bool | None = None,
) -> tuple[MagmaConfig, Params, Tokenizer]:
    """Config, weights on their devices, and tokenizer; arguments and errors as for ``Magma.from_checkpoint``."""
    path = local_path(path)
    if not (path / MODEL_FILE).exists() and holds_weights(path):

        def place(name: str, array: np.ndarray) -> Array:
            spec = PartitionSpec() if mesh is None else parameter_spec(name, array.shape, mesh, SHARDINGS)
            return jax.device_put(array, None if mesh is None else NamedSharding(mesh, spec))

        config, params, tokenizer = read_torch_magma(path, model_config, dtype or "float32", place)
        config = dataclasses.replace(config, dtype=dtype or "float32")
        return config, _for_device(params, config), tokenizer
    config = read_magma_config(path)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    _, shapes, types = abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
    shapes = in_dtype(shapes, jnp.dtype(config.dtype))
    if mesh is not None:
        shapes = placed(shapes, parameter_shardings(shapes, mesh, SHARDINGS))
    params = _for_device(read_trained_params(path, shapes, types, ema=ema), config)
    return config, params, load_tokenizer(path)


def layers_apart(params: Params) -> Params:
    """Unstacks the layers of the language model; removes each stack from ``params`` as it goes, to save memory."""
    stacks = {path: params.pop(path) for path in list(params) if path.startswith(LAYERS)}
    apart: Params = {}
    while stacks:
        path, stacked = stacks.popitem()
        name = path.removeprefix(LAYERS)
        apart |= {f"{LAYERS}{i}/{name}": jax.block_until_ready(stacked[i]) for i in range(stacked.shape[0])}
    return params | apart


def _for_device(params: Params, config: MagmaConfig) -> Params:
    """Unstacks the layers of large models on a single CPU device.

    Half-precision layers stay stacked: they are slow on a CPU for other reasons, and loading needs no extra memory.
    """
    layers = [leaf for path, leaf in params.items() if path.startswith(LAYERS)]
    on_cpu = {device.platform for leaf in layers for device in leaf.sharding.device_set} == {"cpu"}
    one = all(len(leaf.sharding.device_set) == 1 for leaf in layers)
    large = sum(leaf.nbytes for leaf in layers) >= _APART_NBYTES
    return layers_apart(params) if on_cpu and one and large and config.dtype == "float32" else params

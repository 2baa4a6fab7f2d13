"""Opens image tokenizers: run folders, model folders, and files in the published layouts."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from magma_jax.config import ConfigError, from_dict
from magma_jax.families.vqgan.model import SHARDINGS, VQGANModelConfig, build
from magma_jax.foreign import shown
from magma_jax.models.vision.vqgan import VQGANConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.vqgan_keys import open_torch_vqgan, open_vqgan, read_our_vqgan, tokenizer_shapes
from magma_jax.runtime.sharding import parameter_shardings, parameter_spec, placed
from magma_jax.storage.files import holds_weights, open_tensors
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import MODEL_FILE, CheckpointError, in_dtype, open_params, read_model_json
from magma_jax.training.checkpoints.checkpoint import read_trained_params, read_what_was_trained
from magma_jax.typing import Params


def read_config(folder: str | Path) -> VQGANModelConfig:
    """Reads the config of a model folder or run.

    Raises:
        CheckpointError: no such folder, or a model of another kind. ConfigError: an invalid config.
    """
    model = read_model_json(folder)["model"]
    kind = model.get("kind") if isinstance(model, dict) else model
    if kind != VQGANModelConfig.kind:
        raise CheckpointError(f"{folder}: holds a model of kind {shown(kind)}, but an image tokenizer is wanted here")
    return from_dict(VQGANModelConfig, model, "model.json: model")


@contextlib.contextmanager
def open_image_tokenizer(path: str | Path, config: VQGANConfig) -> Iterator[tuple[Params, tuple[Path, ...]]]:
    """Opens the weights of a model's image tokenizer, for ``Family.parts``.

    Args:
        path: run folder or model folder of a VQ-GAN, or a file in a published layout.
        config: the tokenizer that the model wants.

    Yields a lazy tensor for every parameter of ``config``, and the files that they are read from.

    Raises:
        ConfigError: a tokenizer of other sizes. CheckpointError and the errors of ``open_vqgan``: it cannot be read.
    """
    path = Path(path)
    if not (path / MODEL_FILE).exists():
        with open_vqgan(path, config) as opened:
            yield opened
        return
    found, params = open_folder(path)
    if found.tokenizer != config:
        raise ConfigError(f"{path} holds {found.tokenizer}, but the config asks for {config}")
    yield params, (path / MODEL_FILE,)


def open_folder(folder: str | Path) -> tuple[VQGANModelConfig, Params]:
    """Opens a model folder or a trained run, in its stored dtypes.

    Returns the config and a tensor for every parameter of its tokenizer, lazy unless a run has trained it.

    Raises:
        CheckpointError: not such a folder, or a damaged one.
    """
    config = read_config(folder)
    shapes, types = _abstract(config)
    params = open_params(folder) | read_what_was_trained(folder, shapes, types)
    wanted = tokenizer_shapes(config.tokenizer)
    if misfits := [path for path in wanted if path not in params or params[path].shape != wanted[path].shape]:
        raise CheckpointError(f"{folder}: does not fit its config in {', '.join(misfits[:5])}; write it again")
    return config, {path: params[path] for path in wanted}


def load_image_tokenizer(
    path: str | Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    ema: bool | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> tuple[VQGANConfig, Params]:
    """Config and weights of an image tokenizer, on their devices; the parts of training are left out.

    Arguments and errors as for ``Family.open``; the default of ``dtype`` is fp32, ``model_config`` is that of
    ``open_torch_vqgan``.
    """
    path = local_path(path)
    if not (path / MODEL_FILE).exists() and holds_weights(path):
        with open_tensors(path) as weights:
            try:
                config = read_our_vqgan(weights)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            if config is not None:
                arrays = {name: weights.tensors[name].read() for name in tokenizer_shapes(config)}
                arrays = {name: array.astype(dtype or "float32") for name, array in arrays.items()}
                return config, {name: _place(name, array, mesh) for name, array in arrays.items()}
        with open_torch_vqgan(path, model_config, dtype or "float32") as model:
            return model.config, {name: _place(name, tensor.read(), mesh) for name, tensor in model.params.items()}
    whole = read_config(path)
    shapes, types = _abstract(whole)
    shapes = in_dtype(shapes, dtype or "float32")
    if mesh is not None:
        shapes = placed(shapes, parameter_shardings(shapes, mesh, SHARDINGS))
    params = read_trained_params(path, shapes, types, ema=ema)
    return whole.tokenizer, {name: params[name] for name in tokenizer_shapes(whole.tokenizer)}


@functools.lru_cache(maxsize=16)
def _abstract(config: VQGANModelConfig) -> tuple[Params, dict[str, type[nnx.Variable]]]:
    return abstract(lambda: build(config, nnx.Rngs(0)))[1:]


def _place(name: str, array: Any, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(array)
    return jax.device_put(array, NamedSharding(mesh, parameter_spec(name, array.shape, mesh, SHARDINGS)))

"""Opens MAGVLT models: run folders, model folders, and files in the published layout."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from magma_jax.config import from_dict
from magma_jax.data.tokenizers.clip_bpe import clip_bpe
from magma_jax.data.tokenizers.text import TextTokenizer, load_text_tokenizer
from magma_jax.families.magvlt.sharding import SHARDINGS
from magma_jax.foreign import shown
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.nn.modules import abstract
from magma_jax.published.open_magvlt import open_torch_magvlt, transformer_in_dtype
from magma_jax.runtime.sharding import parameter_shardings, parameter_spec, placed
from magma_jax.storage.files import holds_weights
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import MODEL_FILE, CheckpointError, read_model_json
from magma_jax.training.checkpoints.checkpoint import open_trained_params, read_trained_params
from magma_jax.typing import Params


def load_magvlt(
    path: str | Path, dtype: str | None = None, mesh: Mesh | None = None, ema: bool | None = None
) -> tuple[MagvltConfig, Params, TextTokenizer]:
    """Config, weights on their devices, and tokenizer of the texts; arguments as for ``Family.open``.

    A file in the published layout gives fp32 by default.

    Raises:
        CheckpointError: no such folder, or one without a tokenizer. Also the errors of ``open_torch_magvlt``.
    """
    path = local_path(path)
    if not (path / MODEL_FILE).exists() and holds_weights(path):
        with open_torch_magvlt(path, dtype=dtype or "float32") as model:
            params = {}
            for name, tensor in model.params.items():
                spec = PartitionSpec() if mesh is None else parameter_spec(name, tensor.shape, mesh, SHARDINGS)
                params[name] = jax.device_put(tensor.read(), None if mesh is None else NamedSharding(mesh, spec))
            return dataclasses.replace(model.config, dtype=dtype or "float32"), params, clip_bpe()
    config = read_config(path)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    _, shapes, types = abstract(lambda: MagvltModel(config, rngs=nnx.Rngs(0)))
    shapes = transformer_in_dtype(shapes, config.dtype)
    if mesh is not None:
        shapes = placed(shapes, parameter_shardings(shapes, mesh, SHARDINGS))
    params = read_trained_params(path, shapes, types, ema=ema)
    folder = Path(path) / "tokenizer"
    try:
        return config, params, load_text_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no vocabulary ({error}); write the folder again") from None


def read_class_names(path: str | Path, config: MagvltConfig) -> tuple[str, ...]:
    """The answers that a model's classifier knows, in the order of its outputs, as the data of its run name them.

    Raises:
        CheckpointError: the run does not name as many.
    """
    if not config.classes:
        return ()
    path = local_path(path)
    run = read_model_json(path).get("run") if (path / MODEL_FILE).exists() else None
    names = tuple(map(str, ((run or {}).get("data") or {}).get("classes", ())))
    if len(names) != config.classes:
        raise CheckpointError(f"{path}: names {len(names)} answers, but its classifier has {config.classes} classes")
    return names


def open_folder(folder: str | Path) -> tuple[MagvltConfig, Params]:
    """Config of a model folder or a trained run, and its parameters in their stored dtypes, lazy unless trained.

    Raises:
        CheckpointError: not such a folder, or a damaged one.
    """
    config = read_config(folder)
    _, shapes, types = abstract(lambda: MagvltModel(config, rngs=nnx.Rngs(0)))
    return config, open_trained_params(folder, shapes, types)


def read_config(folder: str | Path) -> MagvltConfig:
    """Reads the config of a model folder or run.

    Raises:
        CheckpointError: no such folder, or a model of another kind. ConfigError: an invalid config.
    """
    model = read_model_json(folder)["model"]
    kind = model.get("kind") if isinstance(model, dict) else model
    if kind != MagvltConfig.kind:
        raise CheckpointError(f"{folder}: holds a model of kind {shown(kind)}, but a magvlt is wanted here")
    return from_dict(MagvltConfig, model, "model.json: model")

"""Opens MAGMA checkpoints in the published layout, with lazy parameters."""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from magma_jax.config import ConfigError, from_dict
from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer
from magma_jax.data.tokenizers.settings import settings_of
from magma_jax.foreign import ForeignError, parse_json, shown
from magma_jax.models.magma import MagmaConfig, MagmaModel
from magma_jax.nn.modules import abstract
from magma_jax.published.infer_config import InferenceError, infer_config
from magma_jax.published.keymap import engine as keymap
from magma_jax.published.keymap.stored_dtypes import in_stored_dtypes
from magma_jax.published.magma_keys import BUFFERS, attention_buffers, magma_table
from magma_jax.storage.files import open_tensors
from magma_jax.storage.model_folder import CheckpointError, in_dtype, read_model_json
from magma_jax.typing import Params

# Metadata key of a safetensors file: the config, as JSON.
CONFIG_KEY = "magma_config"
# Metadata key of the vocabulary, unless it is GPT-2's.
TOKENIZER_KEY = "magma_tokenizer"
# Metadata key of its settings.
SETTINGS_KEY = "magma_tokenizer_settings"


def model_shapes(config: MagmaConfig) -> dict[str, Any]:
    """Shape and dtype of every parameter, without allocating it."""
    return dict(abstract_model(config)[0])


@functools.lru_cache(maxsize=16)
def abstract_model(config: MagmaConfig) -> tuple[Params, dict[str, type[nnx.Variable]]]:
    """Shapes and variable types of a model, by path."""
    return abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))[1:]


@dataclass(frozen=True)
class OpenMagma:
    """Model with lazy parameters.

    Attributes:
        config: model config.
        params: path to ``Deferred``; valid inside the block that opened them.
        source: data with which ``to_torch`` reproduces the same file: the counters beside the weights, the order of
            the keys, and buffers that differ from the recomputed ones.
        files: files of the parameters.
        tokenizer: the vocabulary; GPT-2's for files without one.
    """

    config: MagmaConfig
    params: Params
    source: dict[str, Any]
    files: tuple[Path, ...]
    tokenizer: Tokenizer


@contextlib.contextmanager
def open_torch_magma(
    path: str | Path, model_config: Mapping[str, Any] | None = None, dtype: str | None = None
) -> Iterator[OpenMagma]:
    """Opens a checkpoint in the published key layout, without PyTorch and without executing code.

    Args:
        path: anything that ``open_tensors`` opens: a PyTorch file (DeepSpeed dict or bare state dict), safetensors,
            or a folder of shards.
        model_config: values that cannot be inferred from tensors, see ``published.infer_config``.
        dtype: dtype of all floating parameters; default: the file's.

    Raises:
        WeightFileError, InferenceError, KeyMapError: one message that lists all mismatches.
    """
    with open_tensors(path) as weights:
        tensors = weights.tensors
        try:
            described = weights.others.get(CONFIG_KEY)
            if isinstance(described, str):  # safetensors written by this library
                config = from_dict(MagmaConfig, parse_json(described), f"{CONFIG_KEY}: model")
            else:
                config = infer_config(tensors, model_config, lambda line: print(f"{path}: {line}", file=sys.stderr))
            _check_types(tensors)
            tokenizer = _tokenizer_in(weights.others)
            table = magma_table(config)
            shapes = model_shapes(config)
            target = in_stored_dtypes(shapes, table, tensors) if dtype is None else in_dtype(shapes, dtype)
            params = keymap.to_ours(table, tensors, target)
            source = {
                "counters": {} if weights.metadata_is_text else weights.others,
                "keys": list(tensors),
                "buffers": _unusual_buffers(config, tensors),
            }
        except (InferenceError, keymap.KeyMapError, ConfigError) as error:
            raise type(error)(f"{path}: {error}") from None
        except ForeignError as error:
            raise InferenceError(f"{path}: its {CONFIG_KEY} {error}") from None
        except ValueError as error:
            raise InferenceError(f"{path}: {error}") from None
        yield OpenMagma(config, params, source, weights.files, tokenizer)


def read_torch_magma(
    path: str | Path,
    model_config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> tuple[MagmaConfig, Params, Tokenizer]:
    """Reads config, parameters and vocabulary of a checkpoint in the published layout, see ``open_torch_magma``.

    ``place(path, array)`` moves each array to its devices as soon as it is read. The largest arrays come first, so that
    an array and its copy coexist while little else is in memory.
    """
    with open_torch_magma(path, model_config, dtype) as model:
        order = sorted(model.params, key=lambda name: -math.prod(model.params[name].shape))
        params = {name: place(name, model.params[name].read()) for name in order}
        check_vocabulary(path, model.tokenizer, model.config)
        return model.config, {name: params[name] for name in model.params}, model.tokenizer


def read_magma_config(folder: str | Path) -> MagmaConfig:
    """Reads the config of a model folder or run.

    Raises:
        CheckpointError: no such folder, or a model of another kind. ConfigError: an invalid config.
    """
    model = read_model_json(folder)["model"]
    if isinstance(model, dict) and model.get("kind", "magma") != "magma":
        raise CheckpointError(f"{folder}: holds a model of kind {shown(model['kind'])}, but a magma is wanted here")
    return from_dict(MagmaConfig, model, "model.json: model")


def check_vocabulary(path: str | Path, tokenizer: Tokenizer, config: MagmaConfig) -> None:
    """Warns if the model has fewer rows than the vocabulary has tokens, which suggests a wrong vocabulary."""
    if tokenizer.vocab_size > config.lm.vocab_rows:
        print(
            f"{path}: embeds {config.lm.vocab_rows} words, but its vocabulary (GPT-2's unless it holds another) has "
            f"{tokenizer.vocab_size}; from-torch --tokenizer sets the right one",
            file=sys.stderr,
        )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the vocabulary of a model folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(folder) / "tokenizer"
    try:
        return Tokenizer.load(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no vocabulary ({error}); write the folder again") from None


def _tokenizer_in(others: Mapping[Any, Any]) -> Tokenizer:
    words, settings = others.get(TOKENIZER_KEY), others.get(SETTINGS_KEY)
    if not isinstance(words, str):
        return gpt2_tokenizer()
    found = parse_json(settings) if isinstance(settings, str) else {}
    if not isinstance(found, dict):
        raise ForeignError(f"{SETTINGS_KEY} holds no settings, but {shown(found, 40)}")
    return Tokenizer.from_json(words, settings=settings_of(found))


def _check_types(tensors: Mapping[str, Any]) -> None:
    """Raises KeyMapError for 8-bit floats, which are not usable without their scales."""
    if small := [key for key, tensor in tensors.items() if "float8" in tensor.dtype.name]:
        raise keymap.KeyMapError(
            f"{len(small)} tensors are in 8-bit floats, such as {small[0]} ({tensors[small[0]].dtype.name}), which are "
            "not converted; save the checkpoint in half precision first"
        )


def _unusual_buffers(config: MagmaConfig, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Buffers that differ bitwise from the recomputed ones: sines differ in the last bit between math libraries."""
    unusual, usual = {}, {}
    for key, tensor in tensors.items():
        name = key.rsplit(".", 1)[-1]
        if not key.startswith("lm.") or ".attention." not in key or name not in BUFFERS:
            continue
        array = tensor.read()
        # Avoids allocating a mask for the context length that the file claims, unless the stored mask has that size.
        if name == "bias" and array.shape != (1, 1, config.lm.context_length, config.lm.context_length):
            unusual[key] = np.array(array)
            continue
        if (name, tensor.dtype) not in usual:
            usual[name, tensor.dtype] = attention_buffers(config, tensor.dtype, (name,))[name]
        expected = usual[name, tensor.dtype]
        if array.tobytes() != expected.tobytes() or array.shape != expected.shape:
            unusual[key] = np.array(array)
    return unusual

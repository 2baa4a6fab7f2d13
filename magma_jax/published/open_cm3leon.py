"""Opens decoders in OPT's or metaseq's layout as CM3Leon models, with lazy parameters."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from magma_jax.data.tokenizers.layout import SPECIAL, VocabLayout
from magma_jax.foreign import shown
from magma_jax.models.cm3leon import CM3LEON_SIZES, CM3LeonConfig, CM3LeonModel
from magma_jax.models.language.decoder import Activation
from magma_jax.nn.modules import abstract
from magma_jax.published.cm3leon_keys import ROOTS, Layout, cm3leon_table, layout_of
from magma_jax.published.infer_config import InferenceError, layer_count, tensor_shape
from magma_jax.published.keymap.engine import KeyMapError, to_ours
from magma_jax.published.keymap.stored_dtypes import in_stored_dtypes
from magma_jax.storage.deferred import Deferred, read_array
from magma_jax.storage.files import open_tensors
from magma_jax.storage.model_folder import in_dtype

# Names of a value in a file's own ``config``, which transformers, metaseq and others call differently.
_HEADS = ("h", "heads", "num_attention_heads", "decoder_attention_heads", "attention_heads")
_ACTIVATION = ("act", "activation", "activation_function", "activation_fn")
_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}

# metaseq's joint matrix holds keys, values and queries, in this order despite its name.
JOINT, PARTS = "qkv_proj", ("k_proj", "v_proj", "q_proj")


@dataclasses.dataclass(frozen=True)
class OpenCM3Leon:
    """Model with lazy parameters.

    Attributes:
        config: its sizes.
        params: path to ``Deferred``; valid inside the block that opened them.
        source: data with which a file of the same keys in the same order is written: ``layout``, whether the layers
            have a ``joint`` matrix, order of the ``keys``, and ``counters``, the values beside the weights.
        files: files of the parameters.
    """

    config: CM3LeonConfig
    params: dict[str, Deferred]
    source: dict[str, Any]
    files: tuple[Path, ...]


@functools.lru_cache(maxsize=16)
def cm3leon_shapes(config: CM3LeonConfig) -> dict[str, Any]:
    """Shape and dtype of every parameter, by path."""
    return abstract(lambda: CM3LeonModel(config, rngs=nnx.Rngs(0)))[1]


@contextlib.contextmanager
def open_torch_cm3leon(
    path: str | Path,
    model_config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    *,
    any_vocabulary: bool = False,
) -> Iterator[OpenCM3Leon]:
    """Opens a decoder in OPT's or metaseq's layout.

    Args:
        path: anything that ``open_tensors`` opens.
        model_config: ``{"cm3leon": {...}}`` with values that tensors cannot tell; they precede the file's ``config``.
        dtype: dtype of all parameters; default: the file's.
        any_vocabulary: whether ids need no meaning, as for a forward pass.

    Raises:
        InferenceError: not such a decoder, or values that are missing. WeightFileError, TorchFileError: the file cannot
        be read. KeyMapError: its tensors do not match the model, such as biases.
    """
    with open_tensors(path) as weights:
        try:
            layout = layout_of(weights.tensors)
            known = _known(weights.others) | dict((model_config or {}).get("cm3leon") or {})
            tensors, joint = split_joint(weights.tensors)
            config = infer_cm3leon_config(tensors, layout, known, any_vocabulary=any_vocabulary)
            table, shapes = cm3leon_table(layout), cm3leon_shapes(config)
            target = in_stored_dtypes(shapes, table, tensors) if dtype is None else in_dtype(shapes, dtype)
            plan = to_ours(table, tensors, target)
        except (InferenceError, KeyMapError) as error:
            raise type(error)(f"{path}: {error}") from None
        except ValueError as error:
            raise InferenceError(f"{path}: {error}") from None
        source = {
            "layout": layout,
            "joint": joint,
            "keys": list(weights.tensors),
            "counters": {} if weights.metadata_is_text else weights.others,
        }
        yield OpenCM3Leon(config, plan, source, weights.files)


def infer_cm3leon_config(
    tensors: Mapping[str, Any], layout: Layout, known: Mapping[str, Any], *, any_vocabulary: bool = False
) -> CM3LeonConfig:
    """Sizes of a decoder from its tensors and ``known`` values, those of ``MODEL_CONFIG_KEYS["cm3leon"]``.

    Raises:
        InferenceError: a tensor or value is missing, or has an impossible value.
    """
    root = ROOTS[layout]
    rows, width = tensor_shape(tensors, f"{root}embed_tokens.weight")
    positions = tensor_shape(tensors, f"{root}embed_positions.weight")[0] - 2
    layers = layer_count(tensors, rf"{root.replace('.', chr(92) + '.')}layers\.(\d+)\.fc1\.weight")
    if not layers:
        raise InferenceError("it has no layers")
    published = next((one for one in CM3LEON_SIZES.values() if (one.width, one.layers) == (width, layers)), None)
    heads = known.get("heads", None if published is None else published.heads)
    if heads is None:
        raise InferenceError(
            'the number of heads is in no tensor; give --model-config with {"cm3leon": {"heads": ...}}'
        )
    activation = known.get("activation", "relu")
    if activation not in _ACTIVATIONS:
        raise InferenceError(f"cm3leon.activation is one of {', '.join(_ACTIVATIONS)}, got {shown(activation)}")
    sizes = {name: known[name] for name in ("text", "image", "sentinels") if name in known}
    for name, value in {"heads": heads, **sizes, "image_tokens": known.get("image_tokens", 1)}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InferenceError(f"cm3leon.{name} is a number of at least 1, got {shown(value)}")
    if not sizes and VocabLayout().rows > rows:
        if not any_vocabulary:
            raise InferenceError(
                f"which of its {rows} ids are texts and images is in no tensor; give --model-config with "
                '{"cm3leon": {"text": ..., "image": ..., "sentinels": ...}}'
            )
        sizes = {"text": rows - len(SPECIAL) - 2, "image": 1, "sentinels": 1}
    return CM3LeonConfig(
        layers=layers,
        width=width,
        heads=heads,
        feed_forward=tensor_shape(tensors, f"{root}layers.0.fc1.weight")[0],
        vocab_rows=rows,
        vocabulary=VocabLayout(**sizes),
        context_length=positions,
        activation=_ACTIVATIONS[activation],
        image_tokens=known.get("image_tokens", CM3LeonConfig.image_tokens),
    )


def split_joint(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Tensors with a joint matrix of keys, values and queries as three matrices; and whether there was one."""
    split: dict[str, Any] = {}
    for key, tensor in tensors.items():
        if f".{JOINT}." not in key:
            split[key] = tensor
            continue
        if tensor.shape[0] % len(PARTS):
            raise InferenceError(f"the tensor {key} of shape {list(tensor.shape)} is not three matrices")
        for number, part in enumerate(PARTS):
            split[key.replace(JOINT, part)] = _third(tensor, number)
    return split, len(split) != len(tensors)


def join(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of ``split_joint``, for tensors with three matrices in every layer."""
    joined: dict[str, Any] = {}
    for key, tensor in tensors.items():
        part = next((one for one in PARTS if f".{one}." in key), None)
        if part is None:
            joined[key] = tensor
        elif part == PARTS[0]:
            three = [tensors[key.replace(part, other)] for other in PARTS]
            joined[key.replace(part, JOINT)] = _joined(three)
    return joined


def _joined(parts: list[Any]) -> Deferred:
    rows = sum(part.shape[0] for part in parts)
    return Deferred(
        (rows, *parts[0].shape[1:]),
        parts[0].dtype,
        lambda: np.concatenate([read_array(part) for part in parts]),
        position=getattr(parts[0], "position", ("", 0)),
    )


def _third(tensor: Any, number: int) -> Deferred:
    rows = tensor.shape[0] // len(PARTS)
    return Deferred(
        (rows, *tensor.shape[1:]),
        np.dtype(tensor.dtype),
        lambda: read_array(tensor)[number * rows : (number + 1) * rows],
        position=getattr(tensor, "position", ("", 0)),
    )


def _known(others: Mapping[Any, Any]) -> dict[str, Any]:
    """Heads and activation of a file's own config, if it has one."""
    config = others.get("config")
    if not isinstance(config, Mapping):
        return {}
    found = {}
    for name, spellings in (("heads", _HEADS), ("activation", _ACTIVATION)):
        values = [config[one] for one in spellings if one in config]
        found |= {name: values[0]} if values else {}
    return found

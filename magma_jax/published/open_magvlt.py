"""Opens MAGVLT checkpoints in the published layout (``magvlt-it2it-*.ckpt``), with lazy parameters."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from magma_jax.models.magvlt.config import BASE, MagvltConfig
from magma_jax.models.magvlt.layout import SPECIAL_ROWS
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.models.vision.vqgan import TOKENIZER, VQGANConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.infer_config import InferenceError, Known, layer_count, tensor_shape
from magma_jax.published.keymap.engine import KeyMapError, Rule, to_ours
from magma_jax.published.keymap.stored_dtypes import in_stored_dtypes
from magma_jax.published.magvlt_keys import ROOT, transformer_table
from magma_jax.published.vqgan_keys import MAGVLT_PREFIX, infer_vqgan_config, vqgan_table
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.files import open_tensors
from magma_jax.storage.model_folder import in_dtype

# Heads of the released models have this size.
HEAD_SIZE = 128


@dataclasses.dataclass(frozen=True)
class OpenMagvlt:
    """Model with lazy parameters.

    Attributes:
        config: its sizes; with an image tokenizer if the file holds one.
        params: path to ``Deferred``; valid inside the block that opened them.
        source: data with which the same file is written: the order of its ``keys``, and ``counters``, the values beside
            the weights.
        files: files of the parameters.
    """

    config: MagvltConfig
    params: dict[str, Deferred]
    source: dict[str, Any]
    files: tuple[Path, ...]


def is_magvlt(keys: Collection[str]) -> bool:
    """Whether tensors of these names are a MAGVLT checkpoint, with or without its image tokenizer."""
    return {f"{ROOT}tok_emb.weight", f"{ROOT}tok_emb_spc.weight"} <= set(keys)


def magvlt_table(config: MagvltConfig) -> list[Rule]:
    """Key table of a model, both directions."""
    tokenizer = [] if config.tokenizer is None else vqgan_table(MAGVLT_PREFIX, f"{TOKENIZER}/")
    return [*transformer_table(), *tokenizer]


@contextlib.contextmanager
def open_torch_magvlt(
    path: str | Path, model_config: Mapping[str, Any] | None = None, dtype: str | None = None
) -> Iterator[OpenMagvlt]:
    """Opens a checkpoint in the published layout.

    Args:
        path: anything that ``open_tensors`` opens.
        model_config: ``{"transformer": {"n_heads": ..., "text_rows": ...}}``, which tensors may not tell; default: that
            of the file's own ``config``, or the released models'.
        dtype: see ``transformer_in_dtype``; default: the file's dtypes.

    Raises:
        InferenceError: the file holds no MAGVLT model, or one that ``MagvltConfig`` cannot express. WeightFileError,
        TorchFileError: it cannot be read. KeyMapError: its tensors do not match the model.
    """
    with open_tensors(path) as weights:
        tensors = weights.tensors
        stored = weights.others.get("config")
        known = Known(model_config or {})
        try:
            config = infer_magvlt_config(tensors, known, stored if isinstance(stored, Mapping) else {})
            table = magvlt_table(config)
            shapes = abstract(lambda: MagvltModel(config, rngs=nnx.Rngs(0)))[1]
            target = in_stored_dtypes(shapes, table, tensors) if dtype is None else transformer_in_dtype(shapes, dtype)
            plan = to_ours(table, tensors, target)
        except (InferenceError, KeyMapError) as error:
            raise type(error)(f"{path}: {error}") from None
        except ValueError as error:
            raise InferenceError(f"{path}: {error}") from None
        if known.assumed:
            print(f"{path}: assumed {', '.join(known.assumed)}", file=sys.stderr)
        counters = {} if weights.metadata_is_text else weights.others
        yield OpenMagvlt(config, plan, {"keys": list(tensors), "counters": counters}, weights.files)


def transformer_in_dtype(shapes: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Shapes with another floating dtype; the image tokenizer keeps fp32, since codes depend on small differences."""
    kept = {path: shape for path, shape in shapes.items() if path.startswith(f"{TOKENIZER}/")}
    return in_dtype({path: shape for path, shape in shapes.items() if path not in kept}, dtype) | kept


def infer_magvlt_config(tensors: Mapping[str, Any], known: Known, stored: Mapping[Any, Any]) -> MagvltConfig:
    """Sizes of a model from its tensors, its file's ``config`` and the user's values.

    Raises:
        InferenceError: tensors of another model.
    """
    rows, width = tensor_shape(tensors, f"{ROOT}tok_emb.weight", 2)
    special, _ = tensor_shape(tensors, f"{ROOT}tok_emb_spc.weight", 2)
    if special != SPECIAL_ROWS:
        raise InferenceError(f"it has {special} special tokens; models with the {SPECIAL_ROWS} of MixSel are known")
    positions = {name: tensor_shape(tensors, f"{ROOT}pos_emb_{name}.pos_embed", 2)[0] for name in ("img", "txt")}
    tokenizer = _tokenizer(tensors, positions["img"])
    heads = _stored(stored, "h")
    if heads is None:
        reason = f"heads of {HEAD_SIZE}, as in the released models"
        heads = known.get("transformer", "n_heads", max(1, width // HEAD_SIZE), reason)
    text_rows = _stored(stored, "vt")
    if tokenizer is not None:
        text_rows = rows - tokenizer.codes
    elif text_rows is None:
        text_rows = known.get("transformer", "text_rows", BASE.text_rows, "CLIP's vocabulary")
    if not 0 < text_rows < rows:
        raise InferenceError(f"its table has {rows} rows, which is not {text_rows} text tokens and some codes")
    return MagvltConfig(
        layers=layer_count(tensors, r"model\.blocks\.(\d+)\.ln1\.weight"),
        width=width,
        heads=heads,
        image_rows=rows - text_rows,
        text_rows=text_rows,
        image_positions=positions["img"],
        text_positions=positions["txt"],
        tokenizer=tokenizer,
    )


def _tokenizer(tensors: Mapping[str, Any], positions: int) -> VQGANConfig | None:
    inside = {key.removeprefix(MAGVLT_PREFIX): value for key, value in tensors.items() if key.startswith(MAGVLT_PREFIX)}
    if not inside:
        return None
    # Its images have as many codes as the transformer has positions.
    levels = layer_count(inside, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    return infer_vqgan_config(inside, math.isqrt(positions) * 2 ** (levels - 1))


def _stored(config: Mapping[Any, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None

"""Opens model folders and trained runs; parameters that a run has not trained are lazy."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from magma_jax.config import ConfigError, from_union
from magma_jax.convert.golden import BAD_NPZ
from magma_jax.families import family_of_checkpoint
from magma_jax.family import Family
from magma_jax.foreign import ForeignError, open_regular, read_json
from magma_jax.nn.modules import abstract
from magma_jax.published.open_magma import OpenMagma, abstract_model, load_tokenizer, read_magma_config
from magma_jax.storage.model_folder import (
    BUFFER_FILE,
    MODEL_FILE,
    TORCH_FILE,
    CheckpointError,
    open_params,
    read_model_json,
)
from magma_jax.training.checkpoints.checkpoint import open_trained_params, read_what_was_trained
from magma_jax.typing import Params

# The masks of 28 layers and 2048 positions take 120 MB.
_MAX_BUFFER_NBYTES = 2**30


class OpenCheckpoint(NamedTuple):
    """A run folder's result or a model folder, of any family.

    Attributes:
        family: its family.
        config: config of its model.
        types: variable types of the parameters, by path.
        params: in their stored dtypes, lazy but for what a run has trained.
    """

    family: Family
    config: Any
    types: dict[str, type[nnx.Variable]]
    params: Params


def open_checkpoint(folder: Path, *, ema: bool | None = None) -> OpenCheckpoint:
    """Opens a run folder or a model folder of any family.

    Args:
        folder: the folder.
        ema: whether to take a run's moving averages; default: whichever the run was validated with.

    Raises:
        CheckpointError: no such folder, or one that does not fit its config.
    """
    family, metadata = family_of_checkpoint(folder), read_model_json(folder)
    try:
        config = from_union(family.configs, {"kind": family.name} | metadata["model"], f"{MODEL_FILE}: model")
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    _, shapes, types = abstract(lambda: family.build(config, nnx.Rngs(0)))
    return OpenCheckpoint(family, config, types, open_trained_params(folder, shapes, types, ema=ema))


def open_model_folder(folder: str | Path) -> OpenMagma:
    """Opens a model folder or a trained run, in its stored dtypes.

    Parameters of a model folder are lazy; the trained parameters of a run are read at once.
    """
    folder = Path(folder)
    config = read_magma_config(folder)
    shapes, types = abstract_model(config)
    params = open_params(folder)
    if misfits := [path for path in shapes if path not in params or params[path].shape != shapes[path].shape]:
        raise CheckpointError(f"{folder}: does not fit its config in {', '.join(misfits[:5])}; write it again")
    params = {path: params[path] for path in shapes} | read_what_was_trained(folder, shapes, types)
    source: dict[str, Any] = {}
    if (folder / TORCH_FILE).exists():
        source = _read_source(folder)
    return OpenMagma(config, params, source, (folder,), load_tokenizer(folder))


def _read_source(folder: Path) -> dict[str, Any]:
    try:
        source = read_json(folder / TORCH_FILE)
        if not isinstance(source["counters"], dict) or not all(isinstance(key, str) for key in source["keys"]):
            raise ForeignError("does not hold counters and keys")
    except (OSError, ForeignError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / TORCH_FILE}: {error}; convert the checkpoint again") from None
    try:
        with open(open_regular(folder / BUFFER_FILE), "rb") as file, np.load(file, allow_pickle=False) as buffers:
            sizes = [info.file_size for info in buffers.zip.infolist()]
            if sum(sizes) > _MAX_BUFFER_NBYTES:
                raise ValueError(f"it claims to hold {sum(sizes)} bytes")
            return source | {"buffers": dict(buffers)}
    except (*BAD_NPZ, OSError) as error:
        raise CheckpointError(f"{folder / BUFFER_FILE}: {error}; convert the checkpoint again") from None

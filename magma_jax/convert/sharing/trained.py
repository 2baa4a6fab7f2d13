"""What a run has trained, as one small file, and putting it on the frozen weights that it was trained with.

The file is a safetensors file with the library's own paths as names. Its metadata holds the config and the SHA-256 of
all frozen parameters, names, shapes, dtypes and values, so that it goes on no others.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from magma_jax.config import ConfigError, from_union, to_dict
from magma_jax.families import FAMILIES, family_of_checkpoint
from magma_jax.foreign import shown
from magma_jax.nn.modules import abstract
from magma_jax.output import OutputError
from magma_jax.storage.deferred import Deferred, read_array
from magma_jax.storage.model_folder import (
    BASE,
    CheckpointError,
    base_reference,
    open_params,
    read_model_json,
    write_model_folder,
)
from magma_jax.storage.objects.copies import local_copy, new_folder
from magma_jax.storage.safetensors_file import open_safetensors, write_safetensors
from magma_jax.training.checkpoints.checkpoint import open_trained_params, read_what_was_trained
from magma_jax.training.run.stored import read_stored_run
from magma_jax.training.step.optim import FROZEN, label_parameters
from magma_jax.typing import Params
from magma_jax.version import __version__

_FORMAT = "magma_jax trained parameters"


def export_trained(run: str | Path, out: str | Path, *, ema: bool | None = None) -> int:
    """Writes the trained parameters and statistics of a run's result; returns how many numbers they have.

    Args:
        run: run folder.
        out: the file to write.
        ema: whether to take the moving averages; default: whichever the run was validated with.

    Raises:
        CheckpointError: not a run, one that trains every parameter, or ``out`` exists.
    """
    run, out = Path(run), Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    metadata = read_model_json(run)
    if not isinstance(metadata.get("run"), dict):
        raise CheckpointError(f"{run}: not a run of train.py, so nothing says what was trained")
    family = family_of_checkpoint(run)
    config = read_stored_run(family, metadata["run"])
    _, shapes, types = abstract(lambda: family.build(config.model, nnx.Rngs(0)))
    labels = label_parameters(types, config.optim.groups)
    params = open_trained_params(run, shapes, types, ema=ema)
    frozen = {path: leaf for path, leaf in params.items() if labels[path] == FROZEN}
    trained = {path: leaf for path, leaf in params.items() if path not in frozen}
    if not frozen:
        raise CheckpointError(f"{run}: trains every parameter, so there is nothing to put them on; export it whole")
    about = {name: metadata[name] for name in ("source",) if name in metadata}
    about |= {"model": to_dict(config.model), "groups": to_dict(config.optim)["groups"], "magma_jax": __version__}
    text = {"format": _FORMAT, "about": json.dumps(about), "frozen_sha256": fingerprint(frozen)}
    try:
        write_safetensors(out, trained, text)
    except OutputError as error:
        raise CheckpointError(str(error)) from None
    return sum(math.prod(leaf.shape) for leaf in trained.values())


def put_on(file: str | Path, base: str | Path, out: str | Path) -> int:
    """Writes a model folder of the parameters in ``file`` that refers to ``base`` for all others; returns their number.

    Args:
        file: file of ``export_trained``; all three may be in object storage.
        base: run folder or model folder with the same frozen parameters.
        out: the folder to write.

    Raises:
        CheckpointError: ``file`` is of another kind or belongs to another base, or ``out`` exists.
    """
    if Path(out).exists():
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    with new_folder(out) as folder:
        local = local_copy(base)
        return _put_on(local_copy(file), local, folder, base_reference(base, out, local))


def _put_on(file: Path, base: Path, folder: Path, reference: dict[str, str]) -> int:
    opened, trained, text = open_safetensors(file)
    with contextlib.closing(opened):
        about = _about(file, text)
        family = family_of_checkpoint(base)
        where = f"{file}: model"
        if about["model"].get("kind") != family.name and family.name in FAMILIES:
            kind = shown(about["model"].get("kind"))
            raise CheckpointError(f"{file}: belongs to a model of kind {kind}, but {base} is a {family.name}")
        try:
            config = from_union(family.configs, about["model"], where)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        shapes = abstract(lambda: family.build(config, nnx.Rngs(0)))[1]
        if wrong := [path for path, leaf in trained.items() if path not in shapes or leaf.shape != shapes[path].shape]:
            raise CheckpointError(f"{file}: does not fit its own config in {', '.join(wrong[:3])}; write it again")
        frozen = _frozen_of(base, [path for path in shapes if path not in trained], shapes, file)
        if fingerprint(frozen) != text.get("frozen_sha256"):
            raise CheckpointError(
                f"{file}: was trained with other frozen weights than those of {base}; take the base of its run"
            )
        # What a run has trained is in its checkpoints, to which a base does not refer.
        own = {path: leaf for path, leaf in frozen.items() if path in _trained_in(base)}
        params = own | {
            path: Deferred(tuple(leaf.shape), np.dtype(leaf.dtype), leaf.read) for path, leaf in trained.items()
        }
        tokenizer = [path for path in sorted((base / "tokenizer").rglob("*")) if path.is_file()]

        def write_extras(made: Path) -> None:
            for path in tokenizer:
                (made / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
                (made / path.relative_to(base)).write_bytes(path.read_bytes())

        about |= {BASE: reference}
        write_model_folder(folder, about, params, write_extras)
    return sum(math.prod(leaf.shape) for leaf in trained.values())


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 of the names, shapes, dtypes and values of parameters; one layer of a stack is in memory at a time."""
    digest = hashlib.sha256()
    for path in sorted(params):
        tensor = params[path]
        digest.update(f"{path} {np.dtype(tensor.dtype)} {tuple(tensor.shape)}\n".encode())
        for array in _pieces(tensor):
            # As bytes: Python's buffer protocol does not support bfloat16.
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _pieces(tensor: Any) -> Iterator[np.ndarray]:
    rows = getattr(tensor, "rows", ())
    yield from (row.read() for row in rows) if rows else (read_array(tensor),)


def _about(file: Path, text: Mapping[str, str]) -> dict[str, Any]:
    if text.get("format") != _FORMAT:
        raise CheckpointError(f"{file}: not a file of convert export --trained")
    try:
        about = json.loads(text["about"])
        if isinstance(about["model"], dict) and isinstance(about["groups"], dict):
            return about
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"{file}: its metadata is damaged; fetch it again")


def _frozen_of(base: Path, paths: list[str], shapes: Mapping[str, Any], file: Path) -> Params:
    family = family_of_checkpoint(base)
    model = from_union(family.configs, {"kind": family.name} | read_model_json(base)["model"], f"{base}: model")
    _, own_shapes, types = abstract(lambda: family.build(model, nnx.Rngs(0)))
    stored = open_params(base) | read_what_was_trained(base, own_shapes, types)
    lacking = [path for path in paths if path not in stored or tuple(stored[path].shape) != shapes[path].shape]
    if lacking:
        raise CheckpointError(f"{file}: belongs to another base; {base} has no {lacking[0]} of its shape")
    return {path: stored[path] for path in paths}


def _trained_in(base: Path) -> set[str]:
    """Paths that a base has trained itself; empty for a model folder."""
    family, metadata = family_of_checkpoint(base), read_model_json(base)
    if not isinstance(metadata.get("run"), dict):
        return set()
    config = read_stored_run(family, metadata["run"])
    types = abstract(lambda: family.build(config.model, nnx.Rngs(0)))[2]
    return {path for path, label in label_parameters(types, config.optim.groups).items() if label != FROZEN}

"""Starting weights of a run: fresh, from pretrained parts, or from a base folder.

A base is a model folder, or another run, of which the result at the start of this run is used. Frozen parameters of a
base are not copied.

The run folder is a model folder with the starting parameters; checkpoints replace the trained ones.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from magma_jax.config import ConfigError, from_union, to_dict
from magma_jax.data.dataset import Dataset
from magma_jax.nn.modules import abstract
from magma_jax.runtime.distributed import barrier, is_main
from magma_jax.runtime.sharding import MeshConfig, make_mesh, parameter_shardings, placed, replicated
from magma_jax.storage.deferred import Deferred, read_array
from magma_jax.storage.model_folder import (
    BASE,
    base_reference,
    is_whole,
    open_params,
    read_model_json,
    write_model_folder,
)
from magma_jax.storage.objects.copies import WorkingCopy, local_copy
from magma_jax.training.checkpoints.bucket_lock import BucketLock
from magma_jax.training.checkpoints.checkpoint import read_what_was_trained
from magma_jax.training.run.continuation import differences
from magma_jax.training.run.pretrained import open_weights
from magma_jax.training.run.program import Program, fresh_params
from magma_jax.training.step.optim import FROZEN
from magma_jax.typing import Params


def write_run_folder(program: Program, workdir: Path, dataset: Dataset, copy: WorkingCopy | None = None) -> None:
    """Writes the folder of a new run; all processes must call this, and the first one writes.

    Args:
        copy: the working copy that ``workdir`` is, of a run folder in object storage.

    Raises:
        ConfigError: weights or a base that do not fit the model. CheckpointError: no model folder.
    """
    config = program.config
    run = to_dict(config)
    metadata = {"model": run["model"], "groups": run["optim"]["groups"], "run": run}
    trained: Params = {}
    base_types: dict[str, type[nnx.Variable]] = {}
    base = None
    if config.base is not None:
        base = local_copy(config.base)
        base_types = _base_types(program, base)
        # In all processes: reading checkpoints is a collective operation.
        trained = _trained_in_base(program, base, base_types)
        metadata[BASE] = base_reference(config.base, workdir if copy is None else copy.address, base)
    starting = contextlib.nullcontext(program.params)
    if is_main():
        starting = _starting_params(program, dataset, base, base_types.keys(), trained)
    with starting as params:
        # Frozen parameters of a base stay there, unless the base is a run that has trained them.
        kept = {path for path, label in program.labels.items() if config.base and label == FROZEN} - trained.keys()
        own = {path: params[path] for path in program.params if path not in kept}
        write_model_folder(workdir, metadata, own, lambda folder: dataset.tokenizer.save(folder / "tokenizer"))
    if copy is not None:
        if is_main():
            with contextlib.closing(BucketLock(copy.store)):
                copy.begin()
        barrier("run folder uploaded")
        copy.fetch()


@contextlib.contextmanager
def _starting_params(
    program: Program, dataset: Dataset, base: Path | None, in_base: Collection[str], trained: Params
) -> Iterator[Params]:
    """Starting parameters, unread if they come from files; fresh ones are on the devices of this process only."""
    config, devices = program.config, program.mesh.local_devices
    mesh = make_mesh(MeshConfig(fsdp=len(devices)), devices)
    shapes = placed(program.params, parameter_shardings(program.params, mesh, program.family.shardings))
    with _opened(program, shapes, base, in_base) as stored:
        stored = stored | trained
        params = {path: _in_dtype(tensor, shapes[path].dtype) for path, tensor in stored.items()}
        missing = {path: shape for path, shape in shapes.items() if path not in params}
        params |= fresh_params(program.family, config, missing)
        if config.base is None:
            params |= program.family.first_values(program, dataset, params)
        yield params


@contextlib.contextmanager
def _opened(program: Program, shapes: Params, base: Path | None, in_base: Collection[str]) -> Iterator[Params]:
    config = program.config
    if base is None:
        with open_weights(program.family, config.model, config.weights, shapes) as pretrained:
            yield pretrained.params
        return
    stored = open_params(base)
    # The rest is new in this run, such as a class head.
    wanted = [path for path in shapes if path in in_base]
    wrong = [path for path in wanted if path not in stored or tuple(stored[path].shape) != shapes[path].shape]
    wrong += [
        path for path in wanted if path not in wrong and is_whole(stored[path].dtype) != is_whole(shapes[path].dtype)
    ]
    if wrong:
        raise ConfigError(
            f"base: {config.base} lacks {', '.join(wrong[:5])} of the model's shape; compose it again, or, if one of "
            "them is quantized, set model.lm.dtype to what the base has"
        )
    yield {path: stored[path] for path in wanted}


def _trained_in_base(program: Program, base: Path, types: Mapping[str, type[nnx.Variable]]) -> Params:
    """Trained parameters of a base that is a run, replicated on all devices; empty for a model folder."""
    whole = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(program.mesh))
        for path, leaf in program.params.items()
        if path in types
    }
    return read_what_was_trained(base, whole, {path: types[path] for path in whole})


def _in_dtype(tensor: Any, dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    if tensor.dtype == dtype:
        return tensor
    return Deferred(
        tuple(tensor.shape),
        dtype,
        lambda: read_array(tensor).astype(dtype),
        tuple(_in_dtype(row, dtype) for row in getattr(tensor, "rows", ())),
        getattr(tensor, "position", ("", 0)),
    )


def _base_types(program: Program, base: Path) -> dict[str, type[nnx.Variable]]:
    """Variable types of the model in a base.

    Raises:
        ConfigError: the base holds another model.
    """
    family, config = program.family, program.config
    stored = read_model_json(base)["model"]
    model = from_union(family.configs, stored, f"{base}: model")
    theirs = to_dict(model)
    may_differ = family.base_may_differ(theirs)
    changed = [name for name in differences(theirs, to_dict(config.model)) if name not in may_differ]
    if changed:
        raise ConfigError(
            f"base: {config.base} holds another model ({', '.join(changed[:5])} differ); compose one from this config"
        )
    return abstract(lambda: family.build(model, nnx.Rngs(0)))[2]

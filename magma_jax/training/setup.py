"""From a config to a run that is ready to train: data, run folder, starting weights, state."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from magma_jax.config import ConfigError, to_dict
from magma_jax.convert.deferred import read_array
from magma_jax.data.datasets import Dataset, load_dataset
from magma_jax.nn.modules import Params, parameter_count
from magma_jax.sharding import make_mesh, place
from magma_jax.training.config import RunConfig
from magma_jax.training.model_folder import MODEL_FILE, read_model_json, read_params, write_model_folder
from magma_jax.training.optim import partition
from magma_jax.training.pictures import feature_statistics
from magma_jax.training.program import Program, build_program
from magma_jax.training.step import TrainState
from magma_jax.training.weights import open_weights

# What may differ between two parts of one run: how long it is, what is watched, and on how many devices it runs.
MAY_CHANGE = ("steps", "evaluate", "log_every", "checkpoint_every", "mesh", "nonfinite", "nonfinite_limit")


@dataclasses.dataclass
class Run:
    """A run that is ready to train or has been trained."""

    config: RunConfig
    workdir: Path
    dataset: Dataset
    program: Program
    frozen: Params
    state: TrainState

    @property
    def params(self) -> Params:
        """Every parameter and statistic as it is now."""
        return {**self.frozen, **self.state.trainable, **self.state.statistics}


def prepare_run(config: RunConfig, workdir: str | Path, devices: Sequence[jax.Device] | None = None) -> Run:
    """Makes the run folder, or opens the one there; its state is that before the first step.

    Raises:
        ConfigError: the folder holds a run of another config, or the config does not fit the devices.
    """
    workdir = Path(workdir)
    program = build_program(config, make_mesh(config.mesh, devices))
    say(f"preparing data: {config.data.name}")
    dataset = load_dataset(config.data)
    if (workdir / MODEL_FILE).exists():
        _check_same_run(config, workdir)
    else:
        _write_base_folder(program, workdir, dataset)
    # The base folder holds every parameter as the run started; what learns is replaced by the checkpoint's.
    params = read_params(workdir, program.params)
    frozen = partition(params, program.labels)[1]
    state = program.init_state(params)
    say(
        f"model: {parameter_count(state.trainable):,} parameters learn, {parameter_count(frozen):,} are frozen; "
        f"{program.mesh.size} {program.mesh.devices.flat[0].platform} device(s)"
    )
    return Run(config, workdir, dataset, program, frozen, state)


def say(message: str) -> None:
    """One line for whoever watches the run."""
    print(message, file=sys.stderr, flush=True)


def _write_base_folder(program: Program, workdir: Path, dataset: Dataset) -> None:
    config, shapes = program.config, program.params
    params: Params = {}
    with open_weights(config.model, config.weights, shapes) as pretrained:
        for path, tensor in pretrained.params.items():  # one at a time on its way to the devices
            params |= place({path: read_array(tensor)}, {path: shapes[path]})
    params |= program.fresh_params([path for path in shapes if path not in params])
    params = {path: params[path] for path in shapes}
    if dataset.images is not None:
        learned = dataset.images if dataset.learned is None else dataset.images[np.asarray(dataset.learned)]
        statistics = feature_statistics(learned, program.graphdef, params)
        params |= place(statistics, {path: shapes[path] for path in statistics})
    metadata = {"model": to_dict(config.model), "groups": dict(config.optim.groups), "run": to_dict(config)}
    write_model_folder(workdir, metadata, params, lambda folder: dataset.tokenizer.save(folder / "tokenizer"))


def _check_same_run(config: RunConfig, workdir: Path) -> None:
    changed = _differences(read_model_json(workdir).get("run") or {}, to_dict(config))
    changed = [name for name in changed if name.split(".")[0] not in MAY_CHANGE]
    if changed:
        raise ConfigError(
            f"{workdir}: holds a run with another config ({', '.join(changed[:5])}); choose another --workdir"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key in sorted(set(old) | set(new)):
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            names += _differences(old[key], new[key], f"{prefix}{key}.")
        elif old.get(key) != new.get(key):
            names.append(prefix + key)
    return names

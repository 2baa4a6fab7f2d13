"""A run whose drawings are judged: what is checked before, and the names and protocol of its result files."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from magma_jax.config import ConfigError, apply_overrides, from_dict, to_dict
from magma_jax.data.dataset import Dataset
from magma_jax.data.datasets import load_dataset, read_stored_config
from magma_jax.evaluation.results.names import file_stem
from magma_jax.evaluation.tasks.examples import spaced
from magma_jax.output import replace_file
from magma_jax.storage.model_folder import CheckpointError, read_model_json
from magma_jax.training.checkpoints.checkpoint import CHECKPOINTS, RunCheckpoints


def read_settings(defaults: Any, changes: Sequence[str]) -> Any:
    """``defaults`` with ``KEY=VALUE`` changes; raises ConfigError for an unknown key, or a value of a wrong type."""
    return from_dict(type(defaults), apply_overrides(ConfigDict(to_dict(defaults)), changes), "--set")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingRun:
    """A run on OpenMoji's drawings, and what of it is evaluated.

    Attributes:
        workdir: the run folder.
        config: config of its data.
        dataset: its data.
        samples: chosen samples of the split.
        protocol: what the figures belong to, for ``results.json``; ``settings`` among it.
        suffix: end of the names of result files: what differs from the defaults.
    """

    workdir: Path
    config: Any
    dataset: Dataset
    samples: list[Any]
    protocol: dict[str, Any]
    suffix: str

    def file(self, name: str, kind: str) -> Path:
        """Path of a result file."""
        return self.workdir / f"{name}{self.suffix}.{kind}"

    def write_results(self, figures: Mapping[str, Any]) -> None:
        """Writes ``results.json``, atomically."""
        values = json.dumps({**figures, "protocol": self.protocol}, indent=2) + "\n"
        replace_file(self.file("results", "json"), values.encode())


def open_drawing_run(
    workdir: str | Path, split: str, limit: int | None, settings: Any, *, data: type, ema: bool | None
) -> DrawingRun:
    """Opens a run on drawings.

    Args:
        workdir: the run folder, or one derived from a run.
        split: split of the drawings.
        limit: maximum number of samples, evenly spaced; None for all.
        settings: settings of the evaluation, a dataclass with defaults.
        data: class of the data configs that can be judged.
        ema: as for ``Family.open``.

    Raises:
        CheckpointError: the folder holds no run, or none with a checkpoint. ConfigError: no such split, a limit below
            2, or a run on other data.
    """
    workdir = Path(workdir)
    metadata, has_steps = read_model_json(workdir), (workdir / CHECKPOINTS).is_dir()
    run = metadata.get("run")
    # A folder derived from a run, such as a quantized one, names its source and holds all trained parameters.
    if run is None or not (has_steps or "source" in metadata):
        raise CheckpointError(f"{workdir}: holds no checkpoint of a run; give the --workdir that train.py trained in")
    config = read_stored_config(run["data"])
    if not isinstance(config, data):
        raise ConfigError(f"{workdir}: was trained on {config.kind}, but only OpenMoji's drawings can be judged")
    if limit is not None and limit < 2:
        raise ConfigError(f"--limit {limit}: give at least 2 drawings, or none for all")
    dataset = load_dataset(config)
    samples = dataset.evaluation.get(split)
    if not samples:
        raise ConfigError(f"--split {split}: there are {', '.join(dataset.evaluation)}")
    chosen, defaults = to_dict(settings), to_dict(type(settings)())
    protocol: dict[str, Any] = {"split": split, "limit": limit, "training_seed": run["seed"]}
    if has_steps:
        with RunCheckpoints(workdir) as checkpoints:
            protocol["checkpoint_step"] = checkpoints.result_step()
    protocol |= {"settings": chosen, "judge": "nearest drawing, skin colours, probe on EfficientNet-Lite0"}
    averaged = {} if ema is None else {"ema": ema}
    names: dict[str, Any] = {"split": split} if split != "test" else {}
    names |= {} if limit is None else {"limit": limit}
    names |= {key: value for key, value in chosen.items() if value != defaults[key]} | averaged
    return DrawingRun(
        workdir=workdir,
        config=config,
        dataset=dataset,
        samples=[samples[i] for i in spaced(len(samples), limit)],
        protocol=protocol | averaged,
        suffix=f"-{file_stem('', names, names)}" if names else "",
    )

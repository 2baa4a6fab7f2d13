"""``eval.py`` of a run: figures of a split, and its files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from magma_jax.config import ConfigError, apply_overrides, from_dict, to_dict
from magma_jax.data.datasets import load_dataset, read_stored_config
from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig
from magma_jax.data.documents.openmoji_edits import OpenmojiEditsConfig
from magma_jax.evaluation.drawings import DrawingJudge
from magma_jax.evaluation.features import efficientnet_features
from magma_jax.evaluation.results.names import file_stem
from magma_jax.evaluation.tasks.examples import spaced
from magma_jax.families.cm3leon.evaluating.measure import Material, Measured, measure
from magma_jax.families.cm3leon.evaluating.page import table, write_page
from magma_jax.families.cm3leon.evaluating.settings import EvaluationSettings
from magma_jax.families.cm3leon.generator import CM3Leon
from magma_jax.output import printable, replace_file
from magma_jax.storage.model_folder import CheckpointError, read_model_json
from magma_jax.training.checkpoints.checkpoint import CHECKPOINTS, RunCheckpoints


def evaluate_run(
    workdir: str | Path,
    split: str = "test",
    limit: int | None = None,
    settings: Sequence[str] = (),
    *,
    ema: bool | None = None,
) -> Measured:
    """Evaluates a run on OpenMoji's drawings, prints the tables, and writes its files into the run folder.

    A run on drawings draws and describes those of a split; one on edits makes the edits whose answers are in it. The
    files are ``results.json`` and ``report.html``; a split other than ``test``, a limit and other settings are part of
    their names.

    Args:
        workdir: the run folder.
        split: split of the drawings.
        limit: maximum number of drawings, evenly spaced; None for all.
        settings: ``KEY=VALUE`` of ``EvaluationSettings``.
        ema: as for ``Family.open``.

    Raises:
        CheckpointError: the folder holds no run, or none with a checkpoint. ConfigError: a wrong setting, no such
            split, or a run on other data or without images.
    """
    workdir, defaults = Path(workdir), to_dict(EvaluationSettings())
    chosen = from_dict(EvaluationSettings, apply_overrides(ConfigDict(defaults), settings), "--set")
    run = read_model_json(workdir).get("run")
    if run is None or not (workdir / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{workdir}: holds no checkpoint of a run; give the --workdir that train.py trained in")
    config = read_stored_config(run["data"])
    if not isinstance(config, OpenmojiDocumentsConfig):
        raise ConfigError(f"{workdir}: was trained on {config.kind}, but only OpenMoji's drawings can be judged")
    if limit is not None and limit < 2:
        raise ConfigError(f"--limit {limit}: give at least 2 drawings, or none for all")
    dataset = load_dataset(config)
    samples = dataset.evaluation.get(split)
    if not samples:
        raise ConfigError(f"--split {split}: there are {', '.join(dataset.evaluation)}")
    with RunCheckpoints(workdir) as checkpoints:
        step = checkpoints.result_step()
    on_edits = isinstance(config, OpenmojiEditsConfig)
    chosen_samples = [samples[i] for i in spaced(len(samples), limit)]
    images = np.asarray(dataset.images)
    material = Material(
        records=dataset.records,
        images=images,
        rows=[] if on_edits else [record.index for record in chosen_samples],
        edits=chosen_samples if on_edits else [],
        judge=DrawingJudge(dataset.records, images, efficientnet_features),
        documents=0 if on_edits else config.beside.images or config.retrieved,
        annotation=config.annotation,
        by_image=config.beside.by_image,
    )
    found = measure(CM3Leon.from_checkpoint(workdir, ema=ema), material, chosen)

    protocol: dict[str, Any] = {"split": split, "limit": limit, "training_seed": run["seed"], "checkpoint_step": step}
    protocol |= {"settings": to_dict(chosen), "judge": "nearest drawing, skin colours, probe on EfficientNet-Lite0"}
    protocol |= {} if ema is None else {"ema": ema}
    changed = {key: value for key, value in to_dict(chosen).items() if value != defaults[key]}
    names = ({"split": split} if split != "test" else {}) | ({} if limit is None else {"limit": limit}) | changed
    names |= {} if ema is None else {"ema": ema}
    suffix = f"-{file_stem('', names, names)}" if names else ""
    page = workdir / f"report{suffix}.html"
    write_page(page, found, material, protocol, workdir / "metrics.jsonl")
    values = json.dumps(found.figures | {"protocol": protocol}, indent=2) + "\n"
    replace_file(workdir / f"results{suffix}.json", values.encode())
    print(printable(f"{table(found.figures)}\n\nReport: {page}"))
    return found

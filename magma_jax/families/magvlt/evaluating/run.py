"""``eval.py`` of a run: figures of a split, and its files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.config import ConfigError, to_dict
from magma_jax.data.datasets import load_dataset, read_stored_config
from magma_jax.data.openmoji.pairs import OpenmojiPairsConfig
from magma_jax.evaluation.drawings import DrawingJudge
from magma_jax.evaluation.features import efficientnet_features
from magma_jax.evaluation.results.names import file_stem
from magma_jax.evaluation.tasks.examples import spaced
from magma_jax.families.magvlt.evaluating.measure import Measured, measure
from magma_jax.families.magvlt.evaluating.page import table, write_page
from magma_jax.families.magvlt.evaluating.settings import EvaluationSettings, read_settings
from magma_jax.families.magvlt.generator import Magvlt
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
    """Evaluates a run on OpenMoji's drawings, prints the table, and writes its files into the run folder.

    The files are ``results.json``, ``predictions.jsonl`` and ``report.html``; a split other than ``test``, a limit and
    other settings are part of their names.

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
    workdir = Path(workdir)
    chosen = read_settings(settings)
    run = read_model_json(workdir).get("run")
    if run is None or not (workdir / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{workdir}: holds no checkpoint of a run; give the --workdir that train.py trained in")
    config = read_stored_config(run["data"])
    if not isinstance(config, OpenmojiPairsConfig):
        raise ConfigError(f"{workdir}: was trained on {config.kind}, but only OpenMoji's drawings can be judged")
    dataset = load_dataset(config)
    samples = dataset.evaluation.get(split)
    if not samples:
        raise ConfigError(f"--split {split}: there are {', '.join(dataset.evaluation)}")
    if limit is not None and limit < 2:
        raise ConfigError(f"--limit {limit}: give at least 2 drawings, or none for all")
    with RunCheckpoints(workdir) as checkpoints:
        step = checkpoints.result_step()
    model = Magvlt.from_checkpoint(workdir, ema=ema)
    images = np.asarray(dataset.images)
    rows = [int(samples[i].image) for i in spaced(len(samples), limit)]
    judge = DrawingJudge(dataset.records, images, efficientnet_features)
    found = measure(model, dataset.records, images, rows, judge, chosen)

    protocol: dict[str, Any] = {"split": split, "limit": limit, "training_seed": run["seed"], "checkpoint_step": step}
    protocol |= {"settings": to_dict(chosen), "judge": "nearest drawing, skin colours, probe on EfficientNet-Lite0"}
    protocol |= {} if ema is None else {"ema": ema}
    changed = {key: value for key, value in to_dict(chosen).items() if value != to_dict(EvaluationSettings())[key]}
    names = ({"split": split} if split != "test" else {}) | ({} if limit is None else {"limit": limit}) | changed
    names |= {} if ema is None else {"ema": ema}
    suffix = f"-{file_stem('', names, names)}" if names else ""
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in _predictions(found, dataset.records)]
    replace_file(workdir / f"predictions{suffix}.jsonl", "".join(lines).encode())
    page = workdir / f"report{suffix}.html"
    write_page(page, found, dataset.records, images, model, chosen, protocol, workdir / "metrics.jsonl")
    values = json.dumps(found.figures | {"protocol": protocol}, indent=2) + "\n"
    replace_file(workdir / f"results{suffix}.json", values.encode())
    print(printable(f"{table(found.figures)}\n\nReport: {page}"))
    return found


def _predictions(found: Measured, records: Sequence[Any]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for i, (row, said) in enumerate(zip(found.rows, found.said, strict=True)):
        right = {"exact": bool(found.verdict.exact[i]), "concept": bool(found.verdict.concept[i])}
        lines.append({"drawing": records[row].codepoints, "text": records[row].caption, "said": said, **right})
    for edit, changed in zip(found.edits, found.changed, strict=True):
        source, target = records[edit.source], records[edit.target]
        named = {"attribute": edit.attribute, "source": source.caption, "text": target.caption}
        lines.append({"drawing": source.codepoints, **named, "changed": changed})
    return lines

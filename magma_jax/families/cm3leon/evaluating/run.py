"""``eval.py`` of a run: figures of a split, and its files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig
from magma_jax.data.documents.openmoji_edits import OpenmojiEditsConfig
from magma_jax.evaluation.drawing_run import open_drawing_run, read_settings
from magma_jax.evaluation.drawings import DrawingJudge
from magma_jax.evaluation.features import efficientnet_features
from magma_jax.families.cm3leon.evaluating.measure import Material, Measured, measure
from magma_jax.families.cm3leon.evaluating.page import table, write_page
from magma_jax.families.cm3leon.evaluating.settings import EvaluationSettings
from magma_jax.families.cm3leon.generator import CM3Leon
from magma_jax.output import printable


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
    chosen: EvaluationSettings = read_settings(EvaluationSettings(), settings)
    run = open_drawing_run(workdir, split, limit, chosen, data=OpenmojiDocumentsConfig, ema=ema)
    config, dataset = run.config, run.dataset
    on_edits = isinstance(config, OpenmojiEditsConfig)
    images = np.asarray(dataset.images)
    material = Material(
        records=dataset.records,
        images=images,
        rows=[] if on_edits else [record.index for record in run.samples],
        edits=run.samples if on_edits else [],
        judge=DrawingJudge(dataset.records, images, efficientnet_features),
        documents=0 if on_edits else config.beside.images or config.retrieved,
        annotation=config.annotation,
        by_image=config.beside.by_image,
    )
    found = measure(CM3Leon.from_checkpoint(run.workdir, ema=ema), material, chosen)

    page = run.file("report", "html")
    write_page(page, found, material, run.protocol, run.workdir / "metrics.jsonl")
    run.write_results(found.figures)
    print(printable(f"{table(found.figures)}\n\nReport: {page}"))
    return found

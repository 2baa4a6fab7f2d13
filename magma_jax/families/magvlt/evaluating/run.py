"""``eval.py`` of a run: figures of a split, and its files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.data.openmoji.pairs import OpenmojiPairsConfig
from magma_jax.evaluation.drawing_run import open_drawing_run, read_settings
from magma_jax.evaluation.drawings import DrawingJudge
from magma_jax.evaluation.features import efficientnet_features
from magma_jax.families.magvlt.evaluating.measure import Measured, measure
from magma_jax.families.magvlt.evaluating.page import table, write_page
from magma_jax.families.magvlt.evaluating.settings import EvaluationSettings
from magma_jax.families.magvlt.generator import Magvlt
from magma_jax.output import printable, replace_file


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
    chosen: EvaluationSettings = read_settings(EvaluationSettings(), settings)
    run = open_drawing_run(workdir, split, limit, chosen, data=OpenmojiPairsConfig, ema=ema)
    model, records = Magvlt.from_checkpoint(run.workdir, ema=ema), run.dataset.records
    images = np.asarray(run.dataset.images)
    rows = [int(sample.image) for sample in run.samples]
    found = measure(model, records, images, rows, DrawingJudge(records, images, efficientnet_features), chosen)

    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in _predictions(found, records)]
    replace_file(run.file("predictions", "jsonl"), "".join(lines).encode())
    page = run.file("report", "html")
    write_page(page, found, records, images, model, chosen, run.protocol, run.workdir / "metrics.jsonl")
    run.write_results(found.figures)
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

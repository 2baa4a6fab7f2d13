"""Results of an evaluation: metrics, predictions, the table for terminals, and the files of a run folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.evaluation.metrics.bootstrap import SHORT_CAPTIONS
from magma_jax.evaluation.tables import text_table
from magma_jax.output import replace_file

# The model, and three baselines.
CONDITIONS = ("model", "blind", "shuffled", "constant")
CAPTION = "caption"

# Metric, heading, decimals.
COLUMNS = (
    ("caption_exact", "caption exact %", 1),
    ("bleu4", "BLEU-4", 3),
    ("cider", "CIDEr", 2),
    ("rouge_l", "ROUGE-L", 3),
    ("vqa_accuracy", "VQA accuracy %", 1),
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics, and their predictions.

    Attributes:
        figures: as in ``results.json``: the model's metrics by name, the same under ``blind``, ``shuffled`` and
            ``constant``, and ``protocol``, which describes how they were computed.
        samples: evaluated samples, in a fixed order.
        predictions: condition to one text per sample, without surrounding space.
        shuffled_images: row of the image of each sample under ``shuffled``.
    """

    figures: dict[str, Any]
    samples: Sequence[Any]
    predictions: Mapping[str, Sequence[str]]
    shuffled_images: Sequence[int]

    @property
    def truths(self) -> list[str]:
        """The true text of every sample, without surrounding space."""
        return [sample.answer.strip() for sample in self.samples]

    def right(self, condition: str = "model") -> list[bool]:
        """Whether each prediction equals the true text."""
        return [text == truth for text, truth in zip(self.predictions[condition], self.truths, strict=True)]


def question_of(sample: Any) -> str:
    """The question of a sample without its prompt format; empty for a caption."""
    return "" if sample.kind == CAPTION else sample.prompt.strip().removeprefix("Q:").removesuffix("A:").strip()


def figures_of(figures: Mapping[str, Any], condition: str) -> Mapping[str, Any]:
    """The metrics of one condition."""
    return figures if condition == "model" else figures[condition]


def cells(figures: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table: a heading, then one row per condition; "-" if a split has no such samples."""

    def cell(value: float | None, decimals: int) -> str:
        return "-" if value is None else f"{value:.{decimals}f}"

    rows = [["", *(heading for _, heading, _ in COLUMNS)]]
    for condition in CONDITIONS:
        values = figures_of(figures, condition)
        rows.append([condition, *(cell(values[name], decimals) for name, _, decimals in COLUMNS)])
    return rows


def table(figures: Mapping[str, Any]) -> str:
    """The metrics as text: one row per condition, one column per metric, under a summary of the samples."""
    lacks_bleu = figures["bleu4"] is None and figures["caption_exact"] is not None
    note = f"\n\n{SHORT_CAPTIONS}" if lacks_bleu else ""
    return f"{summary(figures)}:\n\n{text_table(cells(figures))}{note}"


def summary(figures: Mapping[str, Any]) -> str:
    """Split, sample counts and step, in one line."""
    protocol = figures["protocol"]
    words = f"{protocol['split']} split, {protocol['captions']} captions, {protocol['questions']} questions"
    step = protocol.get("checkpoint_step")
    return words if step is None else f"{words}, step {step}"


def write_results(path: str | Path, evaluation: Evaluation) -> None:
    """Writes the metrics as JSON."""
    replace_file(path, (json.dumps(evaluation.figures, indent=2, ensure_ascii=False) + "\n").encode())


def write_predictions(path: str | Path, evaluation: Evaluation) -> None:
    """Writes one JSON object per line: the sample, and its prediction under each condition."""
    lines = [
        {
            "picture": int(sample.image),
            "kind": sample.kind,
            "prompt": sample.prompt,
            "truth": truth,
            **{condition: evaluation.predictions[condition][i] for condition in CONDITIONS},
            "shuffled_picture": int(evaluation.shuffled_images[i]),
        }
        for i, (sample, truth) in enumerate(zip(evaluation.samples, evaluation.truths, strict=True))
    ]
    replace_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

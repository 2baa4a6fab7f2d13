"""What an evaluation found: figures, predictions, the table for terminals, and the files of a run folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.evaluation.tables import text_table
from magma_jax.output import replace_file

# The model as it is, and three baselines that know less.
CONDITIONS = ("model", "blind", "shuffled", "constant")
CAPTION = "caption"

# Figure, heading, decimals.
COLUMNS = (
    ("caption_exact", "caption exact %", 1),
    ("bleu4", "BLEU-4", 3),
    ("cider", "CIDEr", 2),
    ("rouge_l", "ROUGE-L", 3),
    ("vqa_accuracy", "VQA accuracy %", 1),
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures and the predictions behind them.

    Attributes:
        figures: as in ``results.json``: the model's figures by name, the same under ``blind``, ``shuffled`` and
            ``constant``, and ``protocol``, which says how all of them were taken.
        samples: what was asked, in a fixed order.
        predictions: condition to one text a sample, without surrounding space.
        shuffled_images: the row of the image that each sample was shown under ``shuffled``.
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
    """The question of a sample without the letters around it; empty for a caption."""
    return "" if sample.kind == CAPTION else sample.prompt.strip().removeprefix("Q:").removesuffix("A:").strip()


def figures_of(figures: Mapping[str, Any], condition: str) -> Mapping[str, Any]:
    """One condition's figures out of the whole."""
    return figures if condition == "model" else figures[condition]


def cells(figures: Mapping[str, Any]) -> list[list[str]]:
    """The table as text: a heading, then a row a condition; "-" where a split has no such samples."""

    def cell(value: float | None, decimals: int) -> str:
        return "-" if value is None else f"{value:.{decimals}f}"

    rows = [["", *(heading for _, heading, _ in COLUMNS)]]
    for condition in CONDITIONS:
        values = figures_of(figures, condition)
        rows.append([condition, *(cell(values[name], decimals) for name, _, decimals in COLUMNS)])
    return rows


def table(figures: Mapping[str, Any]) -> str:
    """The figures for a terminal: a row a condition, a column a metric, and what they were measured on."""
    return f"{summary(figures)}:\n\n{text_table(cells(figures))}"


def summary(figures: Mapping[str, Any]) -> str:
    """Split, sizes and step in a few words."""
    protocol = figures["protocol"]
    words = f"{protocol['split']} split, {protocol['captions']} captions, {protocol['questions']} questions"
    step = protocol.get("checkpoint_step")
    return words if step is None else f"{words}, step {step}"


def write_results(path: str | Path, evaluation: Evaluation) -> None:
    """Writes the figures as JSON."""
    replace_file(path, (json.dumps(evaluation.figures, indent=2, ensure_ascii=False) + "\n").encode())


def write_predictions(path: str | Path, evaluation: Evaluation) -> None:
    """Writes one JSON object a line: the sample, and what was predicted under each condition."""
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

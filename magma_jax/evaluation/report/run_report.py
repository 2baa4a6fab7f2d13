"""The report of a run as one self-contained HTML file: metrics, curves, and every image with its texts."""

import base64
import io
from collections import defaultdict
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from magma_jax.data.datasets import Dataset
from magma_jax.evaluation.report.charts import line_chart
from magma_jax.evaluation.report.pages import fill_page
from magma_jax.evaluation.results.results import (
    CAPTION,
    CONDITIONS,
    Evaluation,
    cells,
    figures_of,
    question_of,
    summary,
)
from magma_jax.evaluation.tables import html_table
from magma_jax.output import replace_file
from magma_jax.training.monitor.writers import read_lines
from magma_jax.typing import UInt8

IMAGE_SIZE = 96
# Flat drawings look the same in 64 colours at half the size.
IMAGE_COLOURS = 64

# Metrics of metrics.jsonl to plot, if the run has them.
CURVES = {
    "loss": "loss (nats a token)",
    "validation_loss": "validation loss (nats a token)",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "samples_per_second": "samples/s",
}

OPENMOJI = (
    'Images: <a href="https://openmoji.org">OpenMoji</a>, the open-source emoji and icon project, licence '
    '<a href="https://creativecommons.org/licenses/by-sa/4.0/">CC BY-SA 4.0</a>; shown smaller and in fewer colours. '
    "Names: Unicode CLDR."
)


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    dataset: Dataset,
    metrics_file: str | Path,
    attribution: str = OPENMOJI,
) -> None:
    """Writes the report atomically.

    Args:
        metrics_file: the run's ``metrics.jsonl``; without one, or with an empty one, the report says so.
        attribution: HTML of the footer, which names the images' source and licence.
    """
    figures = evaluation.figures
    protocol = figures["protocol"]
    decoding = f"{protocol['decoding']} decoding, at most {protocol['max_new_tokens']} new tokens"
    kinds = dict.fromkeys(sample.kind for sample in evaluation.samples)
    page = fill_page(
        "report",
        title=f"What the model says of the {protocol['split']} images",
        summary=escape(summary(figures)),
        table=html_table(cells(figures)),
        protocol=escape(f"{decoding[0].upper()}{decoding[1:]}."),
        kinds=_kinds(evaluation),
        charts=training_charts(Path(metrics_file)),
        options="".join(f"<option>{escape(kind)}</option>" for kind in kinds),
        cards="\n".join(_cards(evaluation, dataset)),
        attribution=attribution,
    )
    replace_file(path, page.encode())


def png(pixels: UInt8[np.ndarray, "h w 3"], size: int = IMAGE_SIZE) -> bytes:
    """An image as a small PNG file."""
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.quantize(IMAGE_COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _kinds(evaluation: Evaluation) -> str:
    counts = evaluation.figures["protocol"]["questions_by_kind"]
    if not counts:
        return ""
    examples = {}
    for sample in evaluation.samples:
        examples.setdefault(sample.kind, question_of(sample))
    rows = [["VQA accuracy % by kind", "questions", *CONDITIONS, "example"]]
    for kind, count in counts.items():
        values = [figures_of(evaluation.figures, condition)["vqa_by_kind"][kind] for condition in CONDITIONS]
        rows.append([kind, str(count), *(f"{value:.1f}" for value in values), examples[kind]])
    return f'<div class="wide kinds">{html_table(rows)}</div>'


def training_charts(metrics_file: Path) -> str:
    """Charts of a run's metrics, as HTML."""
    lines, unreadable = read_lines(metrics_file)
    if not lines:
        return f"<p>No training metrics: {escape(metrics_file.name)} is missing or empty.</p>"
    notes = [f"{unreadable} unreadable lines of {metrics_file.name} are left out."] if unreadable else []
    charts = []
    for name, label in CURVES.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, values = zip(*points, strict=True)
            charts.append(f"<figure>{line_chart(steps, values, 'step', label)}</figure>")
    return f'<div class="charts">{"".join(charts)}</div>' + "".join(f'<p class="soft">{note}</p>' for note in notes)


def _cards(evaluation: Evaluation, dataset: Dataset) -> list[str]:
    """One card per image, captions first."""
    by_image: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(evaluation.samples):
        by_image[int(sample.image)].append(i)
    right, truths, said = evaluation.right(), evaluation.truths, evaluation.predictions["model"]
    assert dataset.images is not None  # the evaluation was of them
    cards = []
    for image, members in by_image.items():
        items = []
        for i in sorted(members, key=lambda i: evaluation.samples[i].kind != CAPTION):
            sample = evaluation.samples[i]
            is_caption = sample.kind == CAPTION
            question = "" if is_caption else f"{escape(question_of(sample))} "
            text = f'<span class="said">{escape(said[i]) or "(nothing)"}</span>'
            correction = "" if right[i] else f' <span class="soft">truth: {escape(truths[i])}</span>'
            mark, word = ("&#10003;", "right") if right[i] else ("&#10007;", "wrong")
            items.append(
                f'<li class="{word}{" caption" if is_caption else ""}" data-kind="{escape(sample.kind)}">'
                f'<span class="mark" role="img" aria-label="{word}">{mark}</span>'
                f"<span>{question}{text}{correction}</span></li>"
            )
        data = base64.b64encode(png(dataset.images[image])).decode()
        truth = next((truths[i] for i in members if evaluation.samples[i].kind == CAPTION), f"image {image}")
        cards.append(
            f'<article class="card"><img src="data:image/png;base64,{data}" width="{IMAGE_SIZE}" '
            f'height="{IMAGE_SIZE}" alt="{escape(truth)}"><ul>{"".join(items)}</ul></article>'
        )
    return cards

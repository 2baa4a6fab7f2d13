"""Gallery of a task as one self-contained HTML page: images, questions, answers, true answers."""

import base64
import collections
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from magma_jax.evaluation.report.pages import fill_page
from magma_jax.evaluation.results.provenance import counted, stamp, title
from magma_jax.evaluation.tables import html_table
from magma_jax.evaluation.tasks.examples import Example, close, spaced
from magma_jax.evaluation.tasks.few_shot import TaskResult
from magma_jax.evaluation.tasks.shots import Shot
from magma_jax.output import replace_file
from magma_jax.typing import UInt8

# Maximum number of examples: an image is about 6 kB, and larger pages are slow in browsers.
SHOWN = 1000
# Pixels per side, for screens with two pixels per point.
IMAGE_SIZE = 256
# CIDEr (0 to 10) from which a caption counts as right, and below which as wrong; there is no natural threshold.
GOOD_CAPTION, BAD_CAPTION = 1.0, 0.3
_SEPARATOR = "\u001f"


def write_gallery(path: str | Path, result: TaskResult, *, shown: int = SHOWN, attribution: str = "") -> None:
    """Writes the page.

    Args:
        path: the HTML file.
        result: result of the task.
        shown: maximum number of examples, evenly spaced.
        attribution: HTML of the footer, which names the images' source and licence.
    """
    numbers = list(spaced(len(result.examples), shown))
    scores = result.per_sample()
    marks = [_mark(result, scores and {k: float(v[i]) for k, v in scores.per_sample.items()}, i) for i in numbers]
    pixels = result.images[np.array([result.examples[i].image for i in numbers])]
    close(result.images)
    shared = result.task.shot_policy == "run" and result.shots and bool(result.shots[0])
    groups = sorted({value for example in result.examples for value in example.groups.values()})
    values = result.to_dict()
    page = fill_page(
        "gallery",
        title=title(values["task"]),
        summary=escape(_summary(result, len(numbers))),
        table=_table(result),
        stamp=escape(stamp(values)) if "checkpoint" in values else "",
        shared=_shots(result, result.shots[0]) if shared else "",
        legend=_legend(result),
        footer=f"<footer>{attribution}</footer>" if attribution else "",
        options="".join(f"<option>{escape(group)}</option>" for group in groups),
        cards="\n".join(_card(result, i, mark, image) for i, mark, image in zip(numbers, marks, pixels, strict=True)),
    )
    replace_file(path, page.encode())


def _mark(result: TaskResult, scores: dict[str, float] | None, i: int) -> tuple[str, float]:
    """The mark (right, partly right or wrong), and its score."""
    if scores is None:
        return "", 0.0
    if "accuracy" in scores:
        value, good, bad = scores["accuracy"], 100.0, 0.0
        return ("right" if value >= good else "wrong" if value <= bad else "partly"), value
    value, truths = scores["CIDEr"], result.examples[i].answers
    good = result.answers[i] in truths or (len(truths) > 1 and value >= GOOD_CAPTION)
    return ("right" if good else "wrong" if value < BAD_CAPTION else "partly"), value


def _legend(result: TaskResult) -> str:
    if not result.scores:
        return "The true answers are secret."
    if result.task.kind != "caption":
        return "The number is the answer's accuracy in percent: 100 is right, 0 wrong, between them partly."
    return (
        "The number is the caption's CIDEr, 0 to 10. A caption is right if it equals a true one, and where there are "
        f"several of these also from {GOOD_CAPTION:g} on; below {BAD_CAPTION:g} it is wrong."
    )


def _summary(result: TaskResult, shown: int) -> str:
    stamped = result.stamp
    words = f"{stamped['samples']} of {stamped['of']} examples of {stamped['data']}, prompt {result.task.prompt!r}"
    return words if shown == len(result.examples) else f"{words}; {shown} are shown, evenly spaced"


def _table(result: TaskResult) -> str:
    rows = [["protocol", "metric", "score", "95 % interval", "commonest"]]
    for which, found in (("", result.scores), (", first line alone", result.first_line)):
        for name, score in found.items():
            for metric, value in score.scores.items():
                low, high = score.intervals[metric]
                commonest = score.commonest["scores"][metric]
                rows.append([f"{name}{which}", metric, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{commonest:.4g}"])
    return html_table(rows) if len(rows) > 1 else ""


def _card(result: TaskResult, i: int, mark: tuple[str, float], image: UInt8[np.ndarray, "h w 3"]) -> str:
    example, output, answer = result.examples[i], result.outputs[i].strip(), result.answers[i]
    word, score = mark
    sign = {"right": "&#10003;", "wrong": "&#10007;", "partly": "~"}.get(word, "")
    data = base64.b64encode(jpeg(image)).decode()
    groups = escape(_SEPARATOR.join(example.groups.values()))
    whole = f'<p class="soft">whole output: {escape(output)}</p>' if output != answer else ""
    mine = [] if result.task.shot_policy == "run" else result.shots[i]
    number = f'<span class="score">{score:.3g}</span>' if word else ""
    return (
        f'<article class="card {word}" tabindex="-1" data-score="{score:.6g}" data-groups="{groups}">'
        f'<img src="data:image/jpeg;base64,{data}" alt="image of {escape(example.id)}" loading="lazy"><div>'
        f"<h3>{number}{escape(example.text or result.task.prompt)}</h3>"
        f'<p><span class="mark" role="img" aria-label="{word}">{sign}</span> '
        f'<span class="said">{escape(answer) or "(nothing)"}</span></p>{whole}'
        f'<p class="soft">{_truth(example)}</p>{_shots(result, mine) if mine else ""}</div></article>'
    )


def _truth(example: Example) -> str:
    counts = collections.Counter(example.answers)
    if len(counts) <= 1:
        return f"truth: {escape(next(iter(counts), 'secret'))}"
    if max(counts.values()) == 1:
        return "<br>".join(escape(answer) for answer in counts)
    return "truth: " + ", ".join(f"{escape(answer)} &times;{count}" for answer, count in counts.most_common())


def _shots(result: TaskResult, shots: Sequence[Shot]) -> str:
    lines = "".join(f"<br>{escape(result.task.complete(shot.text, shot.shown).strip())}" for _, shot in shots)
    return f"<details><summary>{counted(len(shots))}</summary>{lines.removeprefix('<br>')}</details>"


def jpeg(pixels: UInt8[np.ndarray, "h w 3"], size: int = IMAGE_SIZE) -> bytes:
    """An image as a small JPEG file."""
    image = Image.fromarray(pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80, optimize=True)
    return file.getvalue()

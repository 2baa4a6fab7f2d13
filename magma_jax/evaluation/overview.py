"""One picture that shows what a model says: a grid of drawings with caption and one question each."""

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from magma_jax.data.datasets import Dataset
from magma_jax.evaluation.results import CAPTION, Evaluation, replace_file

COLUMNS, ROWS = 4, 3
# Pixels: width of a card, space around it, side of a picture.
CARD, MARGIN, PICTURE = 300, 14, 104
SOFT, LINE, RIGHT, WRONG = "#5b646d", "#dfe3e7", "#1a7f47", "#b3352b"
# Drawn at twice the size and shrunk: smooth edges and letters.
SCALE = 2


def overview_picture(path: str | Path, evaluation: Evaluation, dataset: Dataset, seed: int = 0) -> None:
    """Writes a PNG, 1200 pixels wide: twelve pictures drawn at random, none chosen for its answer.

    The letters come from the font inside Pillow, so the picture is the same on every machine; it has ASCII letters
    only, and pictures whose texts need others are passed over.

    Raises:
        ValueError: the evaluation has no captions, or none that the font can write.
    """
    chosen = _choose(evaluation, seed)
    if not chosen:
        raise ValueError("no picture with a caption to show")
    cards = [_card(evaluation, dataset, caption, question) for caption, question in chosen]
    rows = [cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)]
    heights = [max(height for _, height in row) + 2 * MARGIN * SCALE for row in rows]
    canvas = Image.new("RGB", (COLUMNS * CARD * SCALE, sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    gap, top = MARGIN * SCALE // 2, 0
    for row, height in zip(rows, heights, strict=True):
        for column, (card, used) in enumerate(row):
            left = column * CARD * SCALE
            canvas.paste(card.crop((0, 0, card.width, used)), (left + 2 * gap, top + 2 * gap))
            frame = (left + gap, top + gap, left + CARD * SCALE - gap, top + height - gap)
            draw.rounded_rectangle(frame, radius=8 * SCALE, outline=LINE, width=SCALE)
        top += height
    file = io.BytesIO()
    canvas.reduce(SCALE).save(file, "PNG", optimize=True)
    replace_file(path, file.getvalue())


def _choose(evaluation: Evaluation, seed: int) -> list[tuple[int, int | None]]:
    """Samples by number, a caption and a question of the same picture, each drawn at random."""
    rng = np.random.default_rng(seed)
    captions: dict[int, int] = {}
    questions: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(evaluation.samples):
        texts = sample.prompt + sample.answer + evaluation.predictions["model"][i]
        if not texts.isascii():
            continue
        if sample.kind == CAPTION:
            captions[int(sample.picture)] = i
        else:
            questions[int(sample.picture)].append(i)
    pictures = rng.permutation(sorted(captions))[: COLUMNS * ROWS].tolist()
    return [(captions[p], int(rng.choice(questions[p])) if questions[p] else None) for p in pictures]


def _card(evaluation: Evaluation, dataset: Dataset, caption: int, question: int | None) -> tuple[Image.Image, int]:
    """A picture with its texts, and the height that they take."""
    width, side = (CARD - 2 * MARGIN) * SCALE, PICTURE * SCALE
    card = Image.new("RGB", (width, 3 * width), "white")
    draw = ImageDraw.Draw(card)
    pixels = dataset.images[int(evaluation.samples[caption].picture)]
    card.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), ((width - side) // 2, 0))
    y = side + 8 * SCALE
    for i, size in ((caption, 15), (question, 13)):
        if i is None:
            continue
        sample, said, truth = evaluation.samples[i], evaluation.predictions["model"][i], evaluation.truths[i]
        correct = said == truth
        words = [] if i == caption else [(word, SOFT) for word in sample.prompt.split() if word not in ("Q:", "A:")]
        words += [(word, RIGHT if correct else WRONG) for word in (said or "(nothing)").split()]
        words += [] if correct else [(word, SOFT) for word in f"(truth: {truth})".split()]
        _mark(draw, 5 * SCALE, y + size * SCALE * 0.55, correct)
        y = _write(draw, 16 * SCALE, y, width, words, size) + 5 * SCALE
    return card, y


def _write(
    draw: ImageDraw.ImageDraw, left: int, y: int, right: int, words: Sequence[tuple[str, str]], size: int
) -> int:
    """Writes coloured words into lines between ``left`` and ``right``; returns where the next line begins."""
    font = ImageFont.load_default(size * SCALE)
    line_height = round(size * 1.3) * SCALE
    x = left
    for word, colour in words:
        length = font.getlength(word)
        if x > left and x + length > right:
            x, y = left, y + line_height
        draw.text((x, y), word, font=font, fill=colour)
        x += length + font.getlength(" ")
    return y + line_height


def _mark(draw: ImageDraw.ImageDraw, x: float | int, y: float | int, correct: bool) -> None:
    """A tick or a cross, drawn as lines: the font has neither."""
    s = 4 * SCALE
    if correct:
        draw.line([(x - s, y), (x - s / 3, y + s * 0.7), (x + s, y - s * 0.8)], fill=RIGHT, width=2 * SCALE)
    else:
        draw.line([(x - s * 0.8, y - s * 0.8), (x + s * 0.8, y + s * 0.8)], fill=WRONG, width=2 * SCALE)
        draw.line([(x - s * 0.8, y + s * 0.8), (x + s * 0.8, y - s * 0.8)], fill=WRONG, width=2 * SCALE)

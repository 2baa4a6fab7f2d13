"""Overview image: a grid of drawings with a caption and one question each."""

import io
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from magma_jax.data.datasets import Dataset
from magma_jax.evaluation.report.cards import Card, Line, draw_cards
from magma_jax.evaluation.results.results import CAPTION, Evaluation, question_of
from magma_jax.output import replace_file

IMAGES = 12


def overview_image(path: str | Path, evaluation: Evaluation, dataset: Dataset, seed: int = 0) -> None:
    """Writes a PNG, 1200 pixels wide, with twelve randomly sampled images.

    Images whose texts are not ASCII are skipped, since the font lacks their letters.

    Raises:
        ValueError: the evaluation has no captions, or none in ASCII.
    """
    chosen = _choose(evaluation, seed)
    if not chosen:
        raise ValueError("no image with a caption to show")
    assert dataset.images is not None  # the evaluation was of them
    cards = []
    for members in chosen:
        pixels = dataset.images[int(evaluation.samples[members[0]].image)]
        lines = [
            Line(evaluation.predictions["model"][i], evaluation.truths[i], question_of(evaluation.samples[i]))
            for i in members
        ]
        cards.append(Card(pixels, lines))
    file = io.BytesIO()
    Image.fromarray(draw_cards(cards)).save(file, "PNG", optimize=True)
    replace_file(path, file.getvalue())


def _choose(evaluation: Evaluation, seed: int) -> list[list[int]]:
    """Indices of samples: a caption and a question of the same image, each chosen at random."""
    rng = np.random.default_rng(seed)
    captions: dict[int, int] = {}
    questions: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(evaluation.samples):
        texts = sample.prompt + sample.answer + evaluation.predictions["model"][i]
        if not texts.isascii():
            continue
        if sample.kind == CAPTION:
            captions[int(sample.image)] = i
        else:
            questions[int(sample.image)].append(i)
    images = rng.permutation(sorted(captions))[:IMAGES].tolist()
    return [[captions[p], *([int(rng.choice(questions[p]))] if questions[p] else [])] for p in images]

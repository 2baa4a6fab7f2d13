"""Image to text, infilling, and the length of a text."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from magma_jax.families.magvlt.decoding.arguments import (
    check_steps,
    editable_places,
    ids_of,
    lengths_of,
    pairs_of,
    places_of,
)
from magma_jax.families.magvlt.decoding.open_model import OpenModel, activations
from magma_jax.inference.decoding.masked import Draw, Filled, draw_tokens, fill_text
from magma_jax.inference.decoding.sampling import SamplingRows
from magma_jax.inference.decoding.schedules import Remask
from magma_jax.models.magvlt.model import MagvltModel, canvas_of, untold
from magma_jax.nn.modules import merge
from magma_jax.typing import Array

# Steps of the original's text sampler.
TEXT_STEPS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRun:
    """Settings of a run that draws texts.

    Attributes:
        steps: number of steps, traced.
        remask: which tokens are masked again, static.
        draw: how a token is drawn, static.
        record: steps of the trace, static; 0 for none.
    """

    steps: int = TEXT_STEPS
    remask: Remask = "sample"
    draw: Draw = draw_tokens
    record: int = 0


def length_logits(model: OpenModel, image: Any, *, dummy: int | None = None) -> Array:
    """Logits (B, T) of the length of images' texts; class c is a length of c + 1, end token included.

    The text is as many masked tokens for every image. Its true length must not be used: the image's positions see the
    text, and BOT sees them.

    Args:
        model: the model.
        image: (B, I) codes.
        dummy: length of the dummy text; None for the model's, a quarter of the text positions.
    """
    config = model.config
    image = ids_of("image", image, (len(image), config.image_positions), config.image_rows)
    dummy = config.dummy_length if dummy is None else dummy
    lengths = lengths_of(np.full(len(image), dummy), len(image), config.text_positions)
    return dummy_length_logits(model.definition, model.params, image, lengths, np.zeros(image.shape, bool))


def image_to_text(
    model: OpenModel, image: Any, keys: Any, sampling: SamplingRows, run: TextRun = TextRun(), *, lengths: Any = None
) -> tuple[Filled, np.ndarray]:
    """Texts (B, T) of images, and their lengths (B,), end token included.

    The sum of a row's ``log_probs`` is the original's score of a candidate.

    Args:
        model: the model.
        image: (B, I) codes.
        keys: (B,) random keys; a text depends on its own alone.
        sampling: temperature and filters of every row, traced.
        run: see ``TextRun``.
        lengths: (B,) lengths; None for the likeliest, see ``length_logits``.

    Raises:
        ValueError: arrays of wrong shapes, ids or lengths out of range, or fewer steps than one.
    """
    if lengths is None:
        lengths = np.argmax(length_logits(model, image), -1) + 1
    shape = (len(image), model.config.text_positions)
    return infill_text(model, image, np.zeros(shape, np.int32), np.ones(shape, bool), lengths, keys, sampling, run)


def infill_text(
    model: OpenModel,
    image: Any,
    text: Any,
    editable: Any,
    lengths: Any,
    keys: Any,
    sampling: SamplingRows,
    run: TextRun = TextRun(),
) -> tuple[Filled, np.ndarray]:
    """As ``image_to_text``, but only the editable tokens of a text are drawn.

    Raises:
        ValueError: as ``image_to_text``; or a text in which nothing is editable.
    """
    config = model.config
    image, text, lengths = pairs_of(config, image, text, lengths)
    within = np.arange(config.text_positions) < lengths[:, None]
    places = editable_places(places_of(editable, text.shape) & within, text.shape)
    check_steps(run.steps)
    filled = _draw_text(
        model.definition,
        model.params,
        image,
        np.where(within, text, model.pad_id).astype(np.int32),
        places,
        lengths,
        keys,
        np.int32(run.steps),
        sampling,
        remask=run.remask,
        draw=run.draw,
        record=run.record,
    )
    return filled, lengths


@functools.partial(jax.jit, static_argnames=("definition", "remask", "draw", "record"))
def _draw_text(definition, params, image, text, editable, lengths, keys, steps, sampling, *, remask, draw, record):
    model: MagvltModel = merge(definition, params)

    def predict(tokens: Array, masked: Array) -> Array:
        canvas = canvas_of(image, tokens, lengths, text_masked=masked)
        hidden = model.hidden("image_first", canvas, dtype=activations(params))
        return model.logits(hidden.text, "text")

    return fill_text(predict, text, editable, keys, steps, sampling, remask=remask, draw=draw, record=record)


@functools.partial(jax.jit, static_argnames="definition")
def dummy_length_logits(definition, params, image, lengths, image_masked):
    """The program of ``length_logits``, for images that may be masked and dummy texts of these lengths."""
    model: MagvltModel = merge(definition, params)
    canvas = untold(model.config, image, image_masked, lengths)
    return model.length_logits(model.hidden("image_first", canvas, dtype=activations(params)).bot)

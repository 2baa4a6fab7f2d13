"""The released samplers: text to image, in-painting, image to text.

Each is one jitted program per shape and static setting. To get n candidates, repeat the rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.magvlt.arguments import check_steps, editable_places, ids_of, lengths_of, places_of
from magma_jax.inference.decoding.masked import (
    Draw,
    Filled,
    ImageRule,
    ImageSteps,
    draw_tokens,
    fill_image,
    fill_text,
)
from magma_jax.inference.decoding.sampling import SamplingRows
from magma_jax.inference.decoding.schedules import Remask
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.model import Magvlt, canvas_of
from magma_jax.nn.modules import Definition, merge
from magma_jax.typing import Array, Params, PRNGKey

# Steps of the original's text sampler.
TEXT_STEPS = 12
# The dummy text of the length prediction takes this part of the text positions, 16 of 64 in the original.
DUMMY_PART = 4


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model to draw from: its config, and what ``nn.modules.split`` made of it."""

    config: MagvltConfig
    definition: Definition
    params: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRun:
    """Settings of a run that draws images.

    Attributes:
        settings: steps and temperatures, traced.
        rule: choice of places and schedule, static.
        draw: how a token is drawn, static.
        record: steps of the trace, static; 0 for none.
    """

    settings: ImageSteps = ImageSteps()
    rule: ImageRule = ImageRule()
    draw: Draw = draw_tokens
    record: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRun:
    """Settings of a run that draws texts.

    Attributes:
        pad_id: token past a text's end; the end token is the first of them.
        steps: number of steps, traced.
        remask: which tokens are masked again, static.
        draw: how a token is drawn, static.
        record: steps of the trace, static; 0 for none.
    """

    pad_id: int
    steps: int = TEXT_STEPS
    remask: Remask = "sample"
    draw: Draw = draw_tokens
    record: int = 0


def text_to_image(model: OpenModel, text: Any, text_lengths: Any, key: PRNGKey, run: ImageRun = ImageRun()) -> Filled:
    """Codes (B, I) of images of texts.

    Args:
        model: the model.
        text: (B, T) text tokens, padded.
        text_lengths: (B,) lengths, end token included.
        key: random key.
        run: see ``ImageRun``.

    Raises:
        ValueError: arrays of wrong shapes, ids or lengths out of range, or fewer steps than one.
    """
    shape = (len(text), model.config.image_positions)
    return inpaint(model, np.zeros(shape, np.int32), np.ones(shape, bool), text, text_lengths, key, run)


def inpaint(
    model: OpenModel,
    image: Any,
    editable: Any,
    text: Any,
    text_lengths: Any,
    key: PRNGKey,
    run: ImageRun = ImageRun(),
) -> Filled:
    """Codes (B, I) of images of which only the editable ones are drawn; all others are kept bit for bit.

    Args:
        model: the model.
        image: (B, I) codes.
        editable: (B, I) True for codes to draw anew.
        text: (B, T) text tokens, padded.
        text_lengths: (B,) lengths, end token included.
        key: random key.
        run: see ``ImageRun``.

    Raises:
        ValueError: as ``text_to_image``; or an image in which nothing is editable.
    """
    config = model.config
    text = ids_of("text", text, (len(text), config.text_positions), config.text_rows)
    lengths = lengths_of(text_lengths, len(text), config.text_positions)
    image = ids_of("image", image, (len(text), config.image_positions), config.image_rows)
    places = editable_places(editable, image.shape)
    check_steps(run.settings.steps)
    settings = ImageSteps(
        np.int32(run.settings.steps),
        np.asarray(run.settings.temperature, np.float32),
        np.asarray(run.settings.noise, np.float32),
    )
    return _draw_image(
        model.definition,
        model.params,
        image,
        places,
        text,
        lengths,
        key,
        settings,
        rule=run.rule,
        draw=run.draw,
        record=run.record,
    )


def length_logits(model: OpenModel, image: Any, *, dummy: int | None = None) -> Array:
    """Logits (B, T) of the length of images' texts; class c is a length of c + 1, end token included.

    The text is as many masked tokens for every image. Its true length must not be used: the image's positions see the
    text, and BOT sees them.

    Args:
        model: the model.
        image: (B, I) codes.
        dummy: length of the dummy text; None for the original's, a quarter of the text positions.
    """
    config = model.config
    image = ids_of("image", image, (len(image), config.image_positions), config.image_rows)
    dummy = max(1, config.text_positions // DUMMY_PART) if dummy is None else dummy
    lengths = lengths_of(np.full(len(image), dummy), len(image), config.text_positions)
    return _length_logits(model.definition, model.params, image, lengths)


def image_to_text(
    model: OpenModel, image: Any, key: PRNGKey, sampling: SamplingRows, run: TextRun, *, lengths: Any = None
) -> tuple[Filled, np.ndarray]:
    """Texts (B, T) of images, and their lengths (B,), end token included.

    The sum of a row's ``log_probs`` is the original's score of a candidate.

    Args:
        model: the model.
        image: (B, I) codes.
        key: random key.
        sampling: temperature and filters of every row, traced.
        run: see ``TextRun``.
        lengths: (B,) lengths; None for the likeliest, see ``length_logits``.

    Raises:
        ValueError: arrays of wrong shapes, ids or lengths out of range, or fewer steps than one.
    """
    if lengths is None:
        lengths = np.argmax(length_logits(model, image), -1) + 1
    shape = (len(image), model.config.text_positions)
    return infill_text(model, image, np.zeros(shape, np.int32), np.ones(shape, bool), lengths, key, sampling, run)


def infill_text(
    model: OpenModel,
    image: Any,
    text: Any,
    editable: Any,
    lengths: Any,
    key: PRNGKey,
    sampling: SamplingRows,
    run: TextRun,
) -> tuple[Filled, np.ndarray]:
    """As ``image_to_text``, but only the editable tokens of a text are drawn.

    Raises:
        ValueError: as ``image_to_text``; or a text in which nothing is editable.
    """
    config = model.config
    image = ids_of("image", image, (len(image), config.image_positions), config.image_rows)
    text = ids_of("text", text, (len(image), config.text_positions), config.text_rows)
    ids_of("pad_id", [run.pad_id], (1,), config.text_rows)
    lengths = lengths_of(lengths, len(image), config.text_positions)
    within = np.arange(config.text_positions) < lengths[:, None]
    places = editable_places(places_of(editable, text.shape) & within, text.shape)
    check_steps(run.steps)
    filled = _draw_text(
        model.definition,
        model.params,
        image,
        np.where(within, text, run.pad_id).astype(np.int32),
        places,
        lengths,
        key,
        np.int32(run.steps),
        sampling,
        remask=run.remask,
        draw=run.draw,
        record=run.record,
    )
    return filled, lengths


@functools.partial(jax.jit, static_argnames=("definition", "rule", "draw", "record"))
def _draw_image(definition, params, image, editable, text, lengths, key, settings, *, rule, draw, record):
    model: Magvlt = merge(definition, params)

    def predict(tokens: Array, masked: Array) -> Array:
        canvas = canvas_of(tokens, text, lengths, image_masked=masked)
        hidden = model.hidden("text_first", canvas, dtype=_stored(params))
        return model.logits(hidden.image, "image")

    return fill_image(predict, image, editable, key, settings, rule=rule, draw=draw, record=record)


@functools.partial(jax.jit, static_argnames=("definition", "remask", "draw", "record"))
def _draw_text(definition, params, image, text, editable, lengths, key, steps, sampling, *, remask, draw, record):
    model: Magvlt = merge(definition, params)

    def predict(tokens: Array, masked: Array) -> Array:
        canvas = canvas_of(image, tokens, lengths, text_masked=masked)
        hidden = model.hidden("image_first", canvas, dtype=_stored(params))
        return model.logits(hidden.text, "text")

    return fill_text(predict, text, editable, key, steps, sampling, remask=remask, draw=draw, record=record)


@functools.partial(jax.jit, static_argnames="definition")
def _length_logits(definition, params, image, lengths):
    model: Magvlt = merge(definition, params)
    masked = jnp.arange(model.config.text_positions) < lengths[:, None]
    canvas = canvas_of(image, jnp.zeros(masked.shape, jnp.int32), lengths, text_masked=masked)
    return model.length_logits(model.hidden("image_first", canvas, dtype=_stored(params)).bot)


def _stored(params: Params) -> Any:
    """Dtype of the activations: that of the weights."""
    return params["wte/weight"].dtype

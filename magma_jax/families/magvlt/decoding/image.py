"""Text to image and in-painting."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.magvlt.decoding.arguments import check_steps, editable_places, ids_of, lengths_of
from magma_jax.families.magvlt.decoding.open_model import OpenModel, activations
from magma_jax.inference.decoding.masked import (
    Canvas,
    Draw,
    Filled,
    ImageRule,
    ImageSteps,
    Predict,
    draw_tokens,
    fill_image,
    image_step,
)
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.model import MagvltModel, canvas_of
from magma_jax.nn.modules import Definition, merge
from magma_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRun:
    """Settings of a run that draws images.

    Attributes:
        settings: steps and temperatures, traced.
        guidance: factor s of ``u + s (c - u)``, traced; u are the logits of the empty text. 1 takes no second pass.
        rule: choice of places and schedule, static.
        draw: how a token is drawn, static.
        record: steps of the trace, static; 0 for none.
    """

    settings: ImageSteps = ImageSteps()
    guidance: float = 1.0
    rule: ImageRule = ImageRule()
    draw: Draw = draw_tokens
    record: int = 0


def text_to_image(model: OpenModel, text: Any, text_lengths: Any, keys: Any, run: ImageRun = ImageRun()) -> Filled:
    """Codes (B, I) of images of texts.

    Args:
        model: the model.
        text: (B, T) text tokens, padded.
        text_lengths: (B,) lengths, end token included.
        keys: (B,) random keys; an image depends on its own alone.
        run: see ``ImageRun``.

    Raises:
        ValueError: arrays of wrong shapes, ids or lengths out of range, or fewer steps than one.
    """
    return inpaint(model, *blank(model.config, len(text)), text, text_lengths, keys, run)


def blank(config: MagvltConfig, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of images that are wholly drawn anew, and their editable places."""
    shape = (rows, config.image_positions)
    return np.zeros(shape, np.int32), np.ones(shape, bool)


def inpaint(
    model: OpenModel,
    image: Any,
    editable: Any,
    text: Any,
    text_lengths: Any,
    keys: Any,
    run: ImageRun = ImageRun(),
) -> Filled:
    """Codes (B, I) of images of which only the editable ones are drawn; all others are kept bit for bit.

    Args:
        model: the model.
        image: (B, I) codes.
        editable: (B, I) True for codes to draw anew.
        text: (B, T) text tokens, padded.
        text_lengths: (B,) lengths, end token included.
        keys: (B,) random keys; an image depends on its own alone.
        run: see ``ImageRun``.

    Raises:
        ValueError: as ``text_to_image``; or an image in which nothing is editable.
    """
    arrays = _image_arguments(model, image, editable, text, text_lengths, run)
    return _draw_image(model.definition, model.params, *arrays, keys, rule=run.rule, draw=run.draw, record=run.record)


def canvases(
    model: OpenModel,
    image: Any,
    editable: Any,
    text: Any,
    text_lengths: Any,
    keys: Any,
    run: ImageRun = ImageRun(),
) -> Iterator[Canvas]:
    """The canvas after every step of ``inpaint``; the last holds the same codes, bit for bit."""
    codes, places, *rest = _image_arguments(model, image, editable, text, text_lengths, run)
    canvas = Canvas(codes, places, np.zeros(codes.shape, np.float32))
    for step in range(int(run.settings.steps)):
        canvas = _draw_step(
            model.definition, model.params, canvas, places, *rest, keys, np.int32(step), rule=run.rule, draw=run.draw
        )
        yield canvas


def _image_arguments(model: OpenModel, image: Any, editable: Any, text: Any, lengths: Any, run: ImageRun) -> tuple:
    config = model.config
    text = ids_of("text", text, (len(text), config.text_positions), config.text_rows)
    lengths = lengths_of(lengths, len(text), config.text_positions)
    image = ids_of("image", image, (len(text), config.image_positions), config.image_rows)
    places = editable_places(editable, image.shape)
    check_steps(run.settings.steps)
    return image, places, text, lengths, np.int32(model.pad_id), np.float32(run.guidance), steps_of(run)


def steps_of(run: ImageRun) -> ImageSteps:
    """The traced settings of a run, as arrays of fixed dtypes."""
    numbers = {name: np.asarray(getattr(run.settings, name), np.float32) for name in ("temperature", "noise", "top_p")}
    return ImageSteps(steps=np.int32(run.settings.steps), **numbers)


@functools.partial(jax.jit, static_argnames=("definition", "rule", "draw", "record"))
def _draw_image(
    definition, params, image, editable, text, lengths, pad_id, guidance, settings, keys, *, rule, draw, record
):
    predict = _guided(definition, params, text, lengths, pad_id, guidance)
    return fill_image(predict, image, editable, keys, settings, rule=rule, draw=draw, record=record)


def draw_step(
    definition, params, canvas, editable, text, lengths, pad_id, guidance, settings, keys, step, *, rule, draw
):
    """The canvas after one step; argument shapes as in ``inpaint``."""
    predict = _guided(definition, params, text, lengths, pad_id, guidance)
    return image_step(predict, canvas, editable, step, keys, settings, rule=rule, draw=draw)[0]


_draw_step = jax.jit(draw_step, static_argnames=("definition", "rule", "draw"))


def _guided(
    definition: Definition, params: Params, text: Array, lengths: Array, pad_id: Array, guidance: Array
) -> Predict:
    """Logits of codes given the text, guided away from those of the empty text."""
    model: MagvltModel = merge(definition, params)

    def logits(tokens: Array, masked: Array, text: Array, lengths: Array) -> Array:
        canvas = canvas_of(tokens, text, lengths, image_masked=masked)
        return model.logits(model.hidden("text_first", canvas, dtype=activations(params)).image, "image")

    def both(tokens: Array, masked: Array) -> Array:
        rows = (jnp.concatenate([tokens, tokens]), jnp.concatenate([masked, masked]))
        texts = jnp.concatenate([text, jnp.full_like(text, pad_id)]), jnp.concatenate([lengths, jnp.ones_like(lengths)])
        given, empty = jnp.split(logits(*rows, *texts), 2)
        return empty + guidance * (given - empty)

    def predict(tokens: Array, masked: Array) -> Array:
        return jax.lax.cond(guidance == 1, lambda: logits(tokens, masked, text, lengths), lambda: both(tokens, masked))

    return predict

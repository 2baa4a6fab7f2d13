"""Samplers: text to image, in-painting, image to text, infilling, and both at once.

Each is one jitted program per shape and static setting. To get n candidates, repeat the rows.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.magvlt.arguments import check_steps, editable_places, ids_of, lengths_of, places_of
from magma_jax.inference.decoding.masked import (
    Canvas,
    Draw,
    Filled,
    ImageRule,
    ImageSteps,
    Predict,
    Text,
    draw_tokens,
    fill_image,
    fill_text,
    image_step,
    remasked,
    text_step,
)
from magma_jax.inference.decoding.sampling import SamplingRows
from magma_jax.inference.decoding.schedules import Remask
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.model import MagvltModel, canvas_of
from magma_jax.nn.modules import Definition, merge
from magma_jax.typing import Array, Params

# Steps of the original's text sampler.
TEXT_STEPS = 12
# The dummy text of the length prediction takes this part of the text positions, 16 of 64 in the original.
DUMMY_PART = 4


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model to draw from: its config, what ``nn.modules.split`` made of it, and the token past a text's end."""

    config: MagvltConfig
    definition: Definition
    params: Params
    pad_id: int


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
    return _length_logits(model.definition, model.params, image, lengths, np.zeros(image.shape, bool))


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
    image = ids_of("image", image, (len(image), config.image_positions), config.image_rows)
    text = ids_of("text", text, (len(image), config.text_positions), config.text_rows)
    lengths = lengths_of(lengths, len(image), config.text_positions)
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


def draw_pairs(
    model: OpenModel,
    lengths: Any,
    keys: Any,
    sampling: SamplingRows,
    run: ImageRun = ImageRun(),
    remask: Remask = "sample",
) -> tuple[Filled, Filled]:
    """Images (B, I) and texts (B, T) of given lengths, drawn together from nothing.

    Every step is one pass: codes that it reveals are final, tokens of the text may be drawn again. The original's rule
    is not released; the steps of both are those of the image. Guidance has no effect.

    Raises:
        ValueError: lengths out of range, or fewer steps than one.
    """
    config = model.config
    lengths = lengths_of(lengths, len(lengths), config.text_positions)
    check_steps(run.settings.steps)
    text = np.full((len(lengths), config.text_positions), model.pad_id, np.int32)
    arguments = (*blank(config, len(lengths)), text, lengths, keys, _settings(run), sampling)
    return _draw_pairs(model.definition, model.params, *arguments, rule=run.rule, remask=remask)


def pair_length_logits(model: OpenModel, rows: int) -> Array:
    """Logits (B, T) of the lengths of texts of unknown images."""
    codes, masked = blank(model.config, rows)
    lengths = np.full(rows, max(1, model.config.text_positions // DUMMY_PART), np.int32)
    return _length_logits(model.definition, model.params, codes, lengths, masked)


def _image_arguments(model: OpenModel, image: Any, editable: Any, text: Any, lengths: Any, run: ImageRun) -> tuple:
    config = model.config
    text = ids_of("text", text, (len(text), config.text_positions), config.text_rows)
    lengths = lengths_of(lengths, len(text), config.text_positions)
    image = ids_of("image", image, (len(text), config.image_positions), config.image_rows)
    places = editable_places(editable, image.shape)
    check_steps(run.settings.steps)
    return image, places, text, lengths, np.int32(model.pad_id), np.float32(run.guidance), _settings(run)


def _settings(run: ImageRun) -> ImageSteps:
    numbers = {name: np.asarray(getattr(run.settings, name), np.float32) for name in ("temperature", "noise", "top_p")}
    return ImageSteps(steps=np.int32(run.settings.steps), **numbers)


@functools.partial(jax.jit, static_argnames=("definition", "rule", "draw", "record"))
def _draw_image(
    definition, params, image, editable, text, lengths, pad_id, guidance, settings, keys, *, rule, draw, record
):
    predict = _guided(definition, params, text, lengths, pad_id, guidance)
    return fill_image(predict, image, editable, keys, settings, rule=rule, draw=draw, record=record)


@functools.partial(jax.jit, static_argnames=("definition", "rule", "draw"))
def _draw_step(
    definition, params, canvas, editable, text, lengths, pad_id, guidance, settings, keys, step, *, rule, draw
):
    predict = _guided(definition, params, text, lengths, pad_id, guidance)
    return image_step(predict, canvas, editable, step, keys, settings, rule=rule, draw=draw)[0]


def _guided(
    definition: Definition, params: Params, text: Array, lengths: Array, pad_id: Array, guidance: Array
) -> Predict:
    """Logits of codes given the text, guided away from those of the empty text."""
    model: MagvltModel = merge(definition, params)

    def logits(tokens: Array, masked: Array, text: Array, lengths: Array) -> Array:
        canvas = canvas_of(tokens, text, lengths, image_masked=masked)
        return model.logits(model.hidden("text_first", canvas, dtype=_stored(params)).image, "image")

    def both(tokens: Array, masked: Array) -> Array:
        rows = (jnp.concatenate([tokens, tokens]), jnp.concatenate([masked, masked]))
        texts = jnp.concatenate([text, jnp.full_like(text, pad_id)]), jnp.concatenate([lengths, jnp.ones_like(lengths)])
        given, empty = jnp.split(logits(*rows, *texts), 2)
        return empty + guidance * (given - empty)

    def predict(tokens: Array, masked: Array) -> Array:
        return jax.lax.cond(guidance == 1, lambda: logits(tokens, masked, text, lengths), lambda: both(tokens, masked))

    return predict


@functools.partial(jax.jit, static_argnames=("definition", "remask", "draw", "record"))
def _draw_text(definition, params, image, text, editable, lengths, keys, steps, sampling, *, remask, draw, record):
    model: MagvltModel = merge(definition, params)

    def predict(tokens: Array, masked: Array) -> Array:
        canvas = canvas_of(image, tokens, lengths, text_masked=masked)
        hidden = model.hidden("image_first", canvas, dtype=_stored(params))
        return model.logits(hidden.text, "text")

    return fill_text(predict, text, editable, keys, steps, sampling, remask=remask, draw=draw, record=record)


@functools.partial(jax.jit, static_argnames=("definition", "rule", "remask"))
def _draw_pairs(definition, params, image, editable, text, lengths, keys, settings, sampling, *, rule, remask):
    model: MagvltModel = merge(definition, params)
    words = jnp.arange(text.shape[1]) < lengths[:, None]
    # Of each row, one key for its image and one for its text.
    pairs = jax.vmap(jax.random.split)(keys)

    def body(step: Array, state: tuple[Canvas, Text]) -> tuple[Canvas, Text]:
        codes, tokens = state
        masked = remasked(tokens, words, step, pairs[:, 1], settings.steps, remask=remask)
        canvas = canvas_of(codes.tokens, tokens.tokens, lengths, image_masked=codes.masked, text_masked=masked)
        hidden = model.hidden("image_first", canvas, dtype=_stored(params))
        image_logits, text_logits = model.logits(hidden.image, "image"), model.logits(hidden.text, "text")
        codes, _, _ = image_step(lambda *_: image_logits, codes, editable, step, pairs[:, 0], settings, rule=rule)
        return codes, text_step(lambda *_: text_logits, tokens, masked, step, pairs[:, 1], sampling)

    first = Canvas(image, editable, jnp.zeros(image.shape)), Text(text, jnp.zeros(text.shape))
    codes, tokens = jax.lax.fori_loop(0, settings.steps, body, first)
    return Filled(codes.tokens, codes.log_probs, None), Filled(tokens.tokens, tokens.log_probs, None)


@functools.partial(jax.jit, static_argnames="definition")
def _length_logits(definition, params, image, lengths, image_masked):
    model: MagvltModel = merge(definition, params)
    masked = jnp.arange(model.config.text_positions) < lengths[:, None]
    text = jnp.zeros(masked.shape, jnp.int32)
    canvas = canvas_of(image, text, lengths, image_masked=image_masked, text_masked=masked)
    return model.length_logits(model.hidden("image_first", canvas, dtype=_stored(params)).bot)


@functools.partial(jax.jit, static_argnames="definition")
def _text_likelihood(definition, params, image, text, lengths):
    model: MagvltModel = merge(definition, params)
    words = jnp.arange(text.shape[1]) < lengths[:, None]
    canvas = canvas_of(image, text, lengths, text_masked=words)
    hidden = model.hidden("image_first", canvas, dtype=_stored(params))
    log_probs = jax.nn.log_softmax(model.logits(hidden.text, "text"), -1)
    chosen = jnp.take_along_axis(log_probs, text[..., None], -1)[..., 0]
    return jnp.where(words, chosen, 0).sum(-1)


def text_likelihood(model: OpenModel, image: Any, text: Any, lengths: Any) -> np.ndarray:
    """Log-probability (B,) of texts given images, all tokens masked at once: how well the model finds that they match.

    Raises:
        ValueError: as ``text_to_image``.
    """
    config = model.config
    image = ids_of("image", image, (len(image), config.image_positions), config.image_rows)
    text = ids_of("text", text, (len(image), config.text_positions), config.text_rows)
    lengths = lengths_of(lengths, len(image), config.text_positions)
    return np.asarray(_text_likelihood(model.definition, model.params, image, text, lengths))


def _stored(params: Params) -> Any:
    """Dtype of the activations: that of the weights."""
    return params["wte/weight"].dtype

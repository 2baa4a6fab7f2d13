"""Images and texts drawn together, from nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.magvlt.decoding.arguments import check_steps, lengths_of
from magma_jax.families.magvlt.decoding.image import ImageRun, blank, steps_of
from magma_jax.families.magvlt.decoding.open_model import OpenModel, activations
from magma_jax.families.magvlt.decoding.text import dummy_length_logits
from magma_jax.inference.decoding.masked import Canvas, Filled, Text, image_step, remasked, text_step
from magma_jax.inference.decoding.sampling import SamplingRows
from magma_jax.inference.decoding.schedules import Remask
from magma_jax.models.magvlt.model import MagvltModel, canvas_of
from magma_jax.nn.modules import merge
from magma_jax.typing import Array


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
    arguments = (*blank(config, len(lengths)), text, lengths, keys, steps_of(run), sampling)
    return _draw_pairs(model.definition, model.params, *arguments, rule=run.rule, remask=remask)


def pair_length_logits(model: OpenModel, rows: int) -> Array:
    """Logits (B, T) of the lengths of texts of unknown images."""
    codes, masked = blank(model.config, rows)
    lengths = np.full(rows, model.config.dummy_length, np.int32)
    return dummy_length_logits(model.definition, model.params, codes, lengths, masked)


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
        hidden = model.hidden("image_first", canvas, dtype=activations(params))
        image_logits, text_logits = model.logits(hidden.image, "image"), model.logits(hidden.text, "text")
        codes, _, _ = image_step(lambda *_: image_logits, codes, editable, step, pairs[:, 0], settings, rule=rule)
        return codes, text_step(lambda *_: text_logits, tokens, masked, step, pairs[:, 1], sampling)

    first = Canvas(image, editable, jnp.zeros(image.shape)), Text(text, jnp.zeros(text.shape))
    codes, tokens = jax.lax.fori_loop(0, settings.steps, body, first)
    return Filled(codes.tokens, codes.log_probs, None), Filled(tokens.tokens, tokens.log_probs, None)

"""Text to image and image to text by a causal model, token by token with a cache of keys and values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.magvlt.decoding.arguments import ids_of, lengths_of
from magma_jax.families.magvlt.decoding.image import blank
from magma_jax.families.magvlt.decoding.open_model import OpenModel, activations
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.guidance import guide
from magma_jax.inference.decoding.masked import Filled
from magma_jax.inference.decoding.sampling import SamplingRows, sample, sampling_rows
from magma_jax.models.magvlt.layout import Order, layout_of
from magma_jax.models.magvlt.model import MagvltModel, beside, canvas_of
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import merge
from magma_jax.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeRun:
    """Settings of a run that draws images code by code; all are traced, but whether there is guidance.

    Attributes:
        temperature: divides the logits; first and last value of a line over the codes.
        top_k: likeliest codes that are drawn from; 0 for all.
        top_p: mass of the likeliest codes that are drawn from.
        guidance: factor s of ``u + s (c - u)``; u are the logits of the empty text. 1 takes no second stream.
    """

    temperature: tuple[float, float] = (1.0, 1.0)
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0


def draw_codes(model: OpenModel, text: Any, text_lengths: Any, keys: Any, run: CodeRun = CodeRun()) -> Filled:
    """Codes (B, I) of images of texts, and their log-probabilities without filters.

    Args:
        model: a causal model.
        text: (B, T) text tokens, padded.
        text_lengths: (B,) lengths, end token included.
        keys: (B,) random keys; an image depends on its own alone.
        run: see ``CodeRun``.

    Raises:
        ValueError: arrays of wrong shapes, ids or lengths out of range.
    """
    config, rows = model.config, len(text)
    text = ids_of("text", text, (rows, config.text_positions), config.text_rows)
    lengths = lengths_of(text_lengths, rows, config.text_positions)
    first, last = run.temperature
    sampling = sampling_rows([SamplingConfig(temperature=first, top_k=run.top_k, top_p=run.top_p)] * rows)
    return _continue(
        *(model.definition, model.params, blank(config, rows)[0], text, lengths),
        *(np.int32(model.pad_id), np.full(rows, run.guidance, np.float32)),
        *(sampling, np.float32(last), keys),
        order="text_first",
        guided=run.guidance != 1,
    )


def write_texts(model: OpenModel, image: Any, keys: Any, sampling: SamplingRows) -> Filled:
    """Texts (B, T) of images, padded after their end, and the log-probabilities of their tokens without filters.

    Args:
        model: a causal model.
        image: (B, I) codes.
        keys: (B,) random keys; a text depends on its own alone.
        sampling: temperature and filters of every row, traced; a repetition penalty has no effect.

    Raises:
        ValueError: codes of a wrong shape or out of range.
    """
    config = model.config
    image = ids_of("image", image, (len(image), config.image_positions), config.image_rows)
    text = np.zeros((len(image), config.text_positions), np.int32)
    lengths = np.full(len(image), config.text_positions, np.int32)
    return _continue(
        *(model.definition, model.params, image, text, lengths),
        *(np.int32(model.pad_id), np.ones(len(image), np.float32), sampling, np.float32(-1), keys),
        order="image_first",
        guided=False,
    )


@functools.partial(jax.jit, static_argnames=("definition", "order", "guided"))
def _continue(
    definition: Any,
    params: Any,
    image: Array,
    text: Array,
    lengths: Array,
    pad_id: Any,
    guidance: Any,
    sampling: SamplingRows,
    last: Any,
    keys: Any,
    *,
    order: Order,
    guided: bool,
) -> Filled:
    """The second modality of every row; ``last`` is the last token's temperature, -1 for that of ``sampling``."""
    model: MagvltModel = merge(definition, params)
    config, layout, dtype = model.config, layout_of(model.config, order), activations(params)
    modality = "image" if order == "text_first" else "text"
    begin, count = getattr(layout, modality), getattr(config, f"{modality}_positions")
    last = jnp.where(last < 0, sampling.temperature, last)
    if guided:
        image = jnp.tile(image, (2, 1))
        text = jnp.concatenate([text, jnp.full_like(text, pad_id)])
        lengths = jnp.concatenate([lengths, jnp.ones_like(lengths)])
    canvas = canvas_of(image, text, lengths)
    context = model.context(order, canvas, dtype)
    rows = canvas.image.shape[0]
    # The last token is not fed back.
    slots = jnp.arange(begin + count - 1)
    padded = (slots >= layout.text + canvas.text_lengths[:, None]) & (slots < layout.text + config.text_positions)
    seen = ~padded[:, None] if modality == "image" else None

    def run(x: Array, start: Any, cache: Any) -> tuple[Any, Array]:
        positions = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
        output = model(x, positions=positions, mask=Mask("causal", queries=positions, extra=seen), cache=cache)
        logits = model.logits(beside(output.hidden[:, -1:], context)[:, 0], modality)
        if not guided:
            return output.cache, logits
        given, empty = jnp.split(logits, 2)
        return output.cache, guide(given, empty, guidance)

    def draw(step: Any, logits: Array, ended: Array) -> tuple[Array, Array, Array]:
        heat = sampling.temperature + (last - sampling.temperature) * step / (count - 1)
        numbered = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        chosen = sample(logits, numbered, sampling._replace(temperature=heat))
        token = jnp.where(ended, pad_id, chosen).astype(jnp.int32)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
        over = ended | (token == pad_id) if modality == "text" else ended
        return token, jnp.where(ended, 0, log_prob), over

    def going(state: tuple) -> Array:
        return (state[0] < count) & ~state[-1].all()

    def body(state: tuple) -> tuple:
        step, cache, tokens, log_probs, ended = state
        before = jnp.tile(tokens[:, step - 1], 2) if guided else tokens[:, step - 1]
        x = model.embed_next(order, before, step - 1, canvas, dtype)
        cache, logits = run(x, begin + step - 1, cache)
        token, log_prob, ended = draw(step, logits, ended)
        return step + 1, cache, tokens.at[:, step].set(token), log_probs.at[:, step].set(log_prob), ended

    cache = model.init_cache(rows, len(slots), dtype)
    cache, logits = run(model.embed(order, canvas, dtype)[:, :begin], 0, cache)
    token, log_prob, ended = draw(0, logits, jnp.zeros(len(keys), bool))
    fill = pad_id if modality == "text" else 0
    tokens = jnp.full((len(keys), count), fill, jnp.int32).at[:, 0].set(token)
    log_probs = jnp.zeros((len(keys), count)).at[:, 0].set(log_prob)
    state = jax.lax.while_loop(going, body, (jnp.int32(1), cache, tokens, log_probs, ended))
    return Filled(state[2], state[3], None)

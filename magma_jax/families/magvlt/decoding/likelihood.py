"""How likely a text is given an image, and an image given a text."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.magvlt.decoding.arguments import pairs_of
from magma_jax.families.magvlt.decoding.open_model import OpenModel, activations
from magma_jax.models.magvlt.model import MagvltModel, Modality, canvas_of
from magma_jax.nn.modules import merge


def likelihood(model: OpenModel, image: Any, text: Any, lengths: Any, *, of: Modality) -> np.ndarray:
    """Log-probability (B,) of texts given images, or the reverse: how well the model finds that they match.

    All tokens are masked at once; in a causal model each is predicted from those before it.

    Args:
        model: the model.
        image: (B, I) codes.
        text: (B, T) tokens, padded.
        lengths: (B,) lengths of the texts, end token included.
        of: the modality whose likelihood is computed; the other is given.

    Raises:
        ValueError: arrays of wrong shapes, ids or lengths out of range.
    """
    pairs = pairs_of(model.config, image, text, lengths)
    return np.asarray(_likelihood(model.definition, model.params, *pairs, of=of))


@functools.partial(jax.jit, static_argnames=("definition", "of"))
def _likelihood(definition, params, image, text, lengths, *, of):
    model: MagvltModel = merge(definition, params)
    places = jnp.ones(image.shape, bool) if of == "image" else jnp.arange(text.shape[1]) < lengths[:, None]
    canvas = canvas_of(image, text, lengths, **({} if model.config.causal else {f"{of}_masked": places}))
    hidden = model.hidden("text_first" if of == "image" else "image_first", canvas, dtype=activations(params))
    log_probs = jax.nn.log_softmax(model.logits(getattr(hidden, of), of), -1)
    chosen = jnp.take_along_axis(log_probs, getattr(canvas, of)[..., None], -1)[..., 0]
    return jnp.where(places, chosen, 0).sum(-1)

"""Answers to questions about images as classes, as in the paper's finetuning on VQAv2 (Kim et al., 2023).

The image and the whole question are seen, and a linear classifier with dropout reads the token after BOT, the first of
the question.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.families.magvlt.decoding.arguments import pairs_of
from magma_jax.families.magvlt.decoding.open_model import OpenModel, activations
from magma_jax.families.magvlt.options import MagvltOptions
from magma_jax.models.magvlt.model import MagvltModel, canvas_of
from magma_jax.nn.modules import merge
from magma_jax.training.step.cross_entropy import cross_entropy
from magma_jax.training.step.terms import Terms, label_terms
from magma_jax.training.step.train_step import Batch
from magma_jax.typing import Float, PRNGKey


def class_loss(model: MagvltModel, batch: Batch, key: PRNGKey | None, *, options: MagvltOptions) -> Terms:
    """Cross-entropy of the answers, and its accuracy.

    Args:
        model: a model with classes.
        batch: ``codes`` (B, I); the questions ``tokens`` (B, T) and ``lengths`` (B,), end token included; and
            ``labels`` (B,), ``IGNORED`` for an answer that is no class.
        key: feeds dropout; None for none.
        options: dtype of the activations, remat and label smoothing.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    canvas, dtype = canvas_of(batch["codes"], batch["tokens"], batch["lengths"]), jnp.dtype(options.activations)
    first = model.hidden("image_first", canvas, dtype=dtype, dropout_key=keys[0], remat=options.remat).text[:, 0]
    return label_terms(
        *cross_entropy(
            lambda states: model.class_logits(states, keys[1]),
            first[:, None],
            batch["labels"][:, None],
            label_smoothing=options.label_smoothing,
        )
    )


def class_logits(model: OpenModel, image: Any, text: Any, lengths: Any) -> Float[np.ndarray, "B C"]:
    """Logits of the answers to questions about images.

    Args:
        model: a model with classes.
        image: (B, I) codes.
        text: (B, T) tokens of the questions, padded.
        lengths: (B,) their lengths, end token included.

    Raises:
        ValueError: arrays of wrong shapes, ids or lengths out of range.
    """
    pairs = pairs_of(model.config, image, text, lengths)
    return np.asarray(_class_logits(model.definition, model.params, *pairs))


@functools.partial(jax.jit, static_argnames="definition")
def _class_logits(definition, params, image, text, lengths):
    model: MagvltModel = merge(definition, params)
    hidden = model.hidden("image_first", canvas_of(image, text, lengths), dtype=activations(params))
    return model.class_logits(hidden.text[:, 0])

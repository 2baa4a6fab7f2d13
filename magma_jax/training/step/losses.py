"""The loss of each kind of model: from a batch to hidden states, labels and their cross-entropy."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from magma_jax.data.images import normalize
from magma_jax.models.language.catalog import LANGUAGE_MODELS
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.magma import MagmaModel
from magma_jax.models.vision.catalog import ENCODERS
from magma_jax.nn.attention import causal_mask, same_segment
from magma_jax.nn.convolution import BatchNormMode
from magma_jax.nn.stack import Remat
from magma_jax.training.step.cross_entropy import cross_entropy
from magma_jax.training.step.terms import Terms, label_terms
from magma_jax.typing import IGNORED, Array, Float, Int, PRNGKey

Batch: TypeAlias = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How the forward pass of training runs.

    Attributes:
        batch_norm: ``frozen`` statistics, or statistics of the ``batch`` with running averages as the original.
        remat: what the backward pass recomputes of the language model, see ``nn.stack``.
        encoder_remat: the same of the image encoder.
    """

    batch_norm: BatchNormMode = "frozen"
    remat: Remat = "none"
    encoder_remat: Remat = "none"


def caption_labels(tokens: Int[Array, "B S"], eos_id: int) -> Int[Array, "B S"]:
    """Labels of captions: the tokens up to and including the first eos, ``IGNORED`` behind it (original)."""
    ends = jnp.cumsum(tokens == eos_id, axis=1)
    behind_first_eos = (ends - (tokens == eos_id)) > 0
    return jnp.where(behind_first_eos, IGNORED, tokens)


def caption_loss(model: MagmaModel, batch: Batch, key: PRNGKey | None, *, options: LossOptions) -> Terms:
    """Next-token loss of the words behind a picture (paper, equation 3), or the loss of a classification head.

    With a head (paper, section 4.1.3) a label is a class and stands at the end of text behind a statement, for which
    the embedding of the last token of the statement is asked.

    ``batch`` holds ``tokens`` and ``labels`` (B, S), and either ``images`` (uint8, or normalised pictures) or
    ``features`` (what a frozen encoder made of them, computed once). ``key=None`` means no dropout. If rows hold
    several samples, ``segments`` and ``positions`` (B, S) say which, and pictures and features have a second axis, see
    ``data.batches.batching``.
    """
    if "features" in batch:
        features = batch["features"]
    else:
        *leading, height, width, channels = batch["images"].shape
        images = batch["images"].reshape(-1, height, width, channels)
        if images.dtype == jnp.uint8:
            entry = ENCODERS[model.config.encoder.kind]
            images = normalize(images, entry.mean, entry.std)
        features = model.encode_images(images, batch_norm=options.batch_norm, remat=options.encoder_remat)
        features = features.reshape(*leading, *features.shape[1:])
    forward = {"dropout_key": key, "remat": options.remat}
    if "segments" in batch:
        hidden = model.packed_hidden(features, batch["tokens"], batch["segments"], batch["positions"], **forward)
    else:
        hidden = model.caption_hidden(features, batch["tokens"], **forward)
    if model.class_head is not None:
        return _label_loss(model.class_logits_of, hidden, batch["labels"])
    return _label_loss(model.logits, hidden, batch["labels"])


def language_loss(model: Decoder, batch: Batch, key: PRNGKey | None, *, options: LossOptions) -> Terms:
    """Next-token loss of text alone; ``batch`` holds ``tokens`` and ``labels`` (B, S).

    If rows hold several samples, ``segments`` and ``positions`` (B, S) say which, see ``data.batches.batching``.
    """
    tokens, labels = batch["tokens"][:, :-1], batch["labels"][:, 1:]
    positions = mask = None
    if "segments" in batch:
        segments, positions = batch["segments"], batch["positions"][:, :-1]
        mask = same_segment(segments[:, :-1]) & causal_mask(positions, positions)
        # The first token of a sample follows nothing.
        labels = jnp.where(segments[:, 1:] == segments[:, :-1], labels, IGNORED)
    hidden = model(model.embed(tokens), positions=positions, mask=mask, remat=options.remat).hidden
    return _label_loss(model.logits, hidden, labels)


# By the ``kind`` of the model's config.
LOSSES: dict[str, Callable[..., Terms]] = {
    "magma": caption_loss,
    **dict.fromkeys(LANGUAGE_MODELS, language_loss),
}


def _label_loss(logits: Callable[[Array], Array], hidden: Float[Array, "B S D"], labels: Int[Array, "B S"]) -> Terms:
    return label_terms(*cross_entropy(logits, hidden, labels))

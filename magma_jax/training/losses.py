"""The loss of each kind of model: from a batch to hidden states, labels and their cross-entropy."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp

from magma_jax.models.decoder import Decoder
from magma_jax.models.language_models import LANGUAGE_MODELS
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.convolution import BatchNormMode
from magma_jax.nn.stack import Remat
from magma_jax.training.cross_entropy import IGNORED, cross_entropy
from magma_jax.typing import Array, Float, Int, PRNGKey

Batch: TypeAlias = dict[str, Array]
# Summed loss, number of tokens it sums over, summed metrics.
LossResult: TypeAlias = tuple[Array, Array, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How the forward pass of training runs.

    Attributes:
        batch_norm: ``frozen`` statistics, or statistics of the ``batch`` with running averages as the original.
        remat: what the backward pass recomputes, see ``nn.stack``.
    """

    batch_norm: BatchNormMode = "frozen"
    remat: Remat = "none"


def caption_labels(tokens: Int[Array, "B S"], eos_id: int) -> Int[Array, "B S"]:
    """Labels of captions: the tokens up to and including the first eos, ``IGNORED`` behind it (original)."""
    ends = jnp.cumsum(tokens == eos_id, axis=1)
    behind_first_eos = (ends - (tokens == eos_id)) > 0
    return jnp.where(behind_first_eos, IGNORED, tokens)


def caption_loss(model: MagmaModel, batch: Batch, key: PRNGKey | None, *, options: LossOptions) -> LossResult:
    """Next-token loss of the words behind a picture (paper, equation 3).

    ``batch`` holds ``tokens`` and ``labels`` (B, S), and either ``images`` (normalised pictures) or ``features``
    (what a frozen encoder made of them, computed once). ``key=None`` means no dropout.
    """
    features = (
        batch["features"]
        if "features" in batch
        else model.encode_images(batch["images"], batch_norm=options.batch_norm)
    )
    hidden = model.caption_hidden(features, batch["tokens"], dropout_key=key, remat=options.remat)
    return _token_loss(model, hidden, batch["labels"])


def language_loss(model: Decoder, batch: Batch, key: PRNGKey | None, *, options: LossOptions) -> LossResult:
    """Next-token loss of text alone; ``batch`` holds ``tokens`` and ``labels`` (B, S)."""
    embeddings = model.embed(batch["tokens"][:, :-1])
    hidden = model(embeddings, remat=options.remat).hidden
    return _token_loss(model, hidden, batch["labels"][:, 1:])


# By the ``kind`` of the model's config.
LOSSES: dict[str, Callable[..., LossResult]] = {
    "magma": caption_loss,
    **dict.fromkeys(LANGUAGE_MODELS, language_loss),
}


def _token_loss(model: MagmaModel | Decoder, hidden: Float[Array, "B S D"], labels: Int[Array, "B S"]) -> LossResult:
    loss, count, predicted = cross_entropy(model.logits, hidden, labels)
    return loss, count, {"accuracy": predicted}

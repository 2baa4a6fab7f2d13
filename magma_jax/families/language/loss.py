"""Next-token loss of text."""

import jax.numpy as jnp

from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.masks import Mask
from magma_jax.training.step.cross_entropy import cross_entropy
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.terms import Terms, label_terms
from magma_jax.training.step.train_step import Batch
from magma_jax.typing import IGNORED, PRNGKey


def language_loss(model: Decoder, batch: Batch, key: PRNGKey | None, *, options: LossOptions) -> Terms:
    """Next-token loss of text alone; ``batch`` holds ``tokens`` and ``labels`` (B, S).

    Packed rows also have ``segments`` and ``positions`` (B, S), see ``data.batches.batching``.
    """
    tokens, labels = batch["tokens"][:, :-1], batch["labels"][:, 1:]
    positions = mask = None
    if "segments" in batch:
        segments, positions = batch["segments"], batch["positions"][:, :-1]
        mask = Mask("causal", segments=segments[:, :-1])
        # The first token of a sample has no predecessor.
        labels = jnp.where(segments[:, 1:] == segments[:, :-1], labels, IGNORED)
    hidden = model(model.embed(tokens), positions=positions, mask=mask, remat=options.remat).hidden
    return label_terms(*cross_entropy(model.logits, hidden, labels))

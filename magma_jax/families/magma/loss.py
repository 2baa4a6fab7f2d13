"""The loss of MAGMA: next-token loss of the text after an image, or classification of an image and a statement."""

import jax.numpy as jnp

from magma_jax.models.magma import MagmaModel
from magma_jax.training.step.cross_entropy import cross_entropy
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.terms import Terms, label_terms
from magma_jax.training.step.train_step import Batch
from magma_jax.typing import IGNORED, Array, Int, PRNGKey


def caption_labels(tokens: Int[Array, "B S"], eos_id: int) -> Int[Array, "B S"]:
    """Labels of captions: the tokens up to and including the first eos, ``IGNORED`` after it (as in the original)."""
    ends = jnp.cumsum(tokens == eos_id, axis=1)
    behind_first_eos = (ends - (tokens == eos_id)) > 0
    return jnp.where(behind_first_eos, IGNORED, tokens)


def caption_loss(model: MagmaModel, batch: Batch, key: PRNGKey | None, *, options: LossOptions) -> Terms:
    """Next-token loss of the text after an image (paper, equation 3), or the loss of a classification head.

    With a head (paper, section 4.1.3) the label is a class at the position of the end of text after a statement, and it
    is predicted from the embedding of the statement's last token.

    ``batch`` holds ``tokens`` and ``labels`` (B, S), and either ``images`` (uint8, or normalised images) or
    ``features`` (cached outputs of a frozen encoder). ``key=None`` means no dropout. Packed rows also have ``segments``
    and ``positions`` (B, S), and their images and features have a second axis, see ``data.batches.batching``.
    """
    if "features" in batch:
        features = batch["features"]
    else:
        *leading, height, width, channels = batch["images"].shape
        images = batch["images"].reshape(-1, height, width, channels)
        encode = model.encode_pixels if images.dtype == jnp.uint8 else model.encode_images
        features = encode(images, batch_norm=options.batch_norm, remat=options.encoder_remat)
        features = features.reshape(*leading, *features.shape[1:])
    forward = {"dropout_key": key, "remat": options.remat}
    if "segments" in batch:
        hidden = model.packed_hidden(features, batch["tokens"], batch["segments"], batch["positions"], **forward)
    else:
        hidden = model.caption_hidden(features, batch["tokens"], **forward)
    if model.class_head is not None:
        return label_terms(*cross_entropy(model.class_logits_of, hidden, batch["labels"]))
    return label_terms(*cross_entropy(model.logits, hidden, batch["labels"]))

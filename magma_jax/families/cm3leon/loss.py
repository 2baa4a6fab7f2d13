"""Next-token loss of text and image tokens."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from magma_jax.models.cm3leon import CM3LeonModel
from magma_jax.models.references import Places, References
from magma_jax.nn.stack import Remat
from magma_jax.training.step.cross_entropy import cross_entropy_of_each
from magma_jax.training.step.terms import Term, Terms, label_terms
from magma_jax.training.step.train_step import Batch
from magma_jax.typing import IGNORED, PRNGKey


@dataclasses.dataclass(frozen=True)
class CM3LeonOptions:
    """Options of the loss.

    Attributes:
        remat: remat policy of the layers, see ``nn.stack``.
        activations: dtype of activations; weights keep theirs.
    """

    remat: Remat = "none"
    activations: Literal["float32", "bfloat16"] = "float32"

    may_change: ClassVar[tuple[str, ...]] = ("remat",)
    adds_up: ClassVar[bool] = True

    def for_validation(self) -> "CM3LeonOptions":
        """The same options."""
        return self


def cm3leon_loss(model: CM3LeonModel, batch: Batch, key: PRNGKey | None, *, options: CM3LeonOptions) -> Terms:
    """Next-token loss over all labels, those of moved spans and their sentinels included.

    ``batch`` holds ``tokens`` and ``labels`` (B, S), see ``data.documents.packing``, and of
    documents with retrieved images beside the sequence also ``places`` (B, S), ``references`` and ``captions``
    (``models.references``). Two terms are only logged:
    ``image_loss``, over image codes, and ``text_loss``, over all other labels. Image codes are most labels and less
    predictable, so the loss shows hardly anything of the text; the exponential of a term is its perplexity.
    """
    config: Any = model.config  # CM3LeonConfig; the module's attribute has the type of every decoder's config
    tokens, labels = batch["tokens"][:, :-1], batch["labels"][:, 1:]
    given = places = None
    if "references" in batch:
        given = References(batch["references"], batch["captions"])
        places = Places(batch["places"][:, :-1], batch["places"][:, 1:])
    embedded = model.embed_with(tokens, given, places, jnp.dtype(options.activations))
    hidden = model(embedded, remat=options.remat, dropout_key=key if config.dropout else None).hidden
    hidden = model.head_input(hidden, given, places and places.drawn)
    loss, count, predicted, losses = cross_entropy_of_each(model.logits, hidden, labels)
    codes = config.vocabulary.image_ids
    image = (labels >= codes.start) & (labels < codes.stop)
    text = (labels != IGNORED) & ~image
    return label_terms(loss, count, predicted) | {
        name: Term(jnp.where(part, losses, 0).sum(), part.sum(), weight=0.0)
        for name, part in (("image_loss", image), ("text_loss", text))
    }

"""Next-token loss of text and image tokens."""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from magma_jax.models.cm3leon import CM3LeonModel
from magma_jax.models.references import Places, References
from magma_jax.nn.layers import product
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
        ranges: whether image codes are predicted among codes, and other tokens among the others, which makes the head
            of a small model much cheaper; only for rows of one document, with as many codes as an image has. Decoding
            restricts the vocabulary in the same way.
        text_weight: weight of a label that is no code, with ``ranges``; most labels are codes.
    """

    remat: Remat = "none"
    activations: Literal["float32", "bfloat16"] = "float32"
    ranges: bool = False
    text_weight: float = 1.0

    may_change: ClassVar[tuple[str, ...]] = ("remat",)
    adds_up: ClassVar[bool] = True

    def __post_init__(self):
        if not self.text_weight >= 0:
            raise ValueError(f"loss.text_weight must be at least 0, got {self.text_weight}")
        if self.text_weight != 1 and not self.ranges:
            raise ValueError("loss.text_weight needs loss.ranges, which computes codes and other labels apart")

    def for_validation(self) -> "CM3LeonOptions":
        """The same options."""
        return self


def cm3leon_loss(model: CM3LeonModel, batch: Batch, key: PRNGKey | None, *, options: CM3LeonOptions) -> Terms:
    """Next-token loss over all labels, those of moved spans and their sentinels included.

    ``batch`` holds ``tokens`` and ``labels`` (B, S), see ``data.documents.packing``, for models that read them
    ``places`` (B, S) of codes in their grids, and of documents with retrieved images beside the sequence ``references``
    and ``captions`` (``models.references``). Two terms are only logged: ``image_loss``, over image codes, and
    ``text_loss``, over all other labels. Image codes are most labels and less predictable, so the loss shows hardly
    anything of the text; the exponential of a term is its perplexity.
    """
    config: Any = model.config  # CM3LeonConfig; the module's attribute has the type of every decoder's config
    tokens, labels = batch["tokens"][:, :-1], batch["labels"][:, 1:]
    dtype, by_side = jnp.dtype(options.activations), "references" in batch
    given = References(batch["references"], batch["captions"]) if by_side else None
    if "places" in batch:
        places = Places(batch["places"][:, :-1], batch["places"][:, 1:])
        embedded = model.embed_with(tokens, given, places, dtype)
    else:
        embedded = model.embed(tokens, dtype)
    hidden = model(embedded, remat=options.remat, dropout_key=key).hidden
    if "places" in batch:
        seen = model.seen(tokens, places.read, dtype=dtype)
        hidden = model.head_input(hidden, given, places.drawn, seen, key)
    codes = config.vocabulary.image_ids
    image = (labels >= codes.start) & (labels < codes.stop)
    if options.ranges and by_side:
        order = jnp.argsort(~image, axis=1, stable=True)  # the codes of the row's image come first
        hidden, labels = (_in_order(array, order) for array in (hidden, labels))
        image = _in_order(image, order)
        size, table = config.image_tokens, model.wte.weight[...].astype(hidden.dtype)
        parts = [
            _part(table[codes.start : codes.stop], hidden[:, :size], labels[:, :size], codes.start),
            _part(table[: codes.start], hidden[:, size:], labels[:, size:], 0),
        ]
        weight = options.text_weight
        loss, count, predicted = (parts[0][i] + weight * parts[1][i] for i in range(3))
        losses = jnp.concatenate([part[3] for part in parts], axis=1)
    else:
        loss, count, predicted, losses = cross_entropy_of_each(model.logits, hidden, labels)
    text = (labels != IGNORED) & ~image
    return label_terms(loss, count, predicted) | {
        name: Term(jnp.where(part, losses, 0).sum(), part.sum(), weight=0.0)
        for name, part in (("image_loss", image), ("text_loss", text))
    }


def _in_order(array: Any, order: Any) -> Any:
    """Positions (B, S, ...) in another order (B, S)."""
    return jnp.take_along_axis(array, order[..., None] if array.ndim > 2 else order, axis=1)


def _part(rows: Any, hidden: Any, labels: Any, first: int) -> Any:
    """The losses of labels among the ids from ``first`` on that ``rows`` belong to; others are ignored."""
    own = (labels >= first) & (labels < first + rows.shape[0])
    project = functools.partial(product, weight=rows, preferred_element_type=jnp.float32)
    return cross_entropy_of_each(project, hidden, jnp.where(own, labels - first, IGNORED))

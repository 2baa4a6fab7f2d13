"""Losses as named terms, each a sum and a count, so that parts of a batch add up exactly.

The loss is the sum of ``weight * total / count`` over its terms, with totals and counts over the whole batch: all its
parts, rows and devices. A term of weight 0 is only logged.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from magma_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        total: sum over the counted items.
        count: number of counted items; it may depend on labels and keys, but not on parameters.
        weight: weight of the mean in the loss.
    """

    total: Any  # scalar; its shape in a tree of shapes
    count: Any
    weight: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def mean(self) -> Any:
        """The mean; 0 if nothing was counted."""
        return self.total / (self.count + (self.count == 0))  # also for NumPy scalars, in their precision


Terms = Mapping[str, Term]

# The name of the sum of all terms; a loss with a single term uses it for that term.
LOSS = "loss"


def learned_counts(terms: Terms) -> dict[str, Array]:
    """Counts of the terms with a weight, sorted by name; the first of them divides the gradients of a step."""
    # Sorted as JAX sorts dict keys in pytrees.
    return {name: terms[name].count for name in sorted(terms) if terms[name].weight}


def objective(terms: Terms, counts: Mapping[str, Array]) -> Array:
    """The differentiated value: the loss times the first of ``counts``, which are those of the whole batch.

    The objectives of a batch's parts add up to that of the batch.
    """
    first, *others = counts
    total = _weighted(terms[first])
    for name in others:
        share = jnp.maximum(counts[first], 1) / jnp.maximum(counts[name], 1)
        total = total + _weighted(terms[name]) * share
    return total


def term_means(terms: Terms) -> dict[str, Any]:
    """The mean of every term, and their weighted sum, the loss."""
    means = {name: term.mean for name, term in terms.items()}
    return means | {LOSS: sum(term.weight * means[name] for name, term in terms.items() if term.weight)}


def label_terms(loss: Array, count: Array, predicted: Array) -> dict[str, Term]:
    """Terms of ``cross_entropy``: the loss, and the accuracy with weight 0."""
    return {LOSS: Term(loss, count), "accuracy": Term(predicted, count, weight=0.0)}


def _weighted(term: Term) -> Array:
    return term.total if term.weight == 1.0 else term.weight * term.total

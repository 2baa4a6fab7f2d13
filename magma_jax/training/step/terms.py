"""A loss as named terms, each the sum over what it counts, so that parts of a batch add up exactly.

The loss is the sum of ``weight * total / count`` over its terms, every total and count taken over the whole batch: over
all its parts, rows and devices. A term of weight 0 is logged and nothing else.
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
        total: sum over what is counted.
        count: how many were counted; it must depend on labels and keys alone, not on parameters.
        weight: of the mean in the loss.
    """

    total: Any  # scalars; anything in a tree of shapes
    count: Any
    weight: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def mean(self) -> Any:
        """0 where nothing was counted."""
        return self.total / (self.count + (self.count == 0))  # of NumPy's numbers too, in their precision


Terms = Mapping[str, Term]

# The name of the sum of all terms; a loss of one term calls it so.
LOSS = "loss"


def learned_counts(terms: Terms) -> dict[str, Array]:
    """Counts of the terms that have a weight, by name in order; the first of them divides the gradients of a step."""
    # Sorted, as JAX sorts the keys of every dict that goes through it.
    return {name: terms[name].count for name in sorted(terms) if terms[name].weight}


def objective(terms: Terms, counts: Mapping[str, Array]) -> Array:
    """What is differentiated: the loss times the first of ``counts``, which are those of the whole batch.

    Objectives of the parts of a batch add up to that of the batch.
    """
    first, *others = counts
    total = _weighted(terms[first])
    for name in others:
        share = jnp.maximum(counts[first], 1) / jnp.maximum(counts[name], 1)
        total = total + _weighted(terms[name]) * share
    return total


def term_means(terms: Terms) -> dict[str, Any]:
    """The mean of every term, and the loss that they make."""
    means = {name: term.mean for name, term in terms.items()}
    return means | {LOSS: sum(term.weight * means[name] for name, term in terms.items() if term.weight)}


def label_terms(loss: Array, count: Array, predicted: Array) -> dict[str, Term]:
    """Terms of ``cross_entropy``: the loss of the labels, and how many of them were predicted."""
    return {LOSS: Term(loss, count), "accuracy": Term(predicted, count, weight=0.0)}


def _weighted(term: Term) -> Array:
    return term.total if term.weight == 1.0 else term.weight * term.total

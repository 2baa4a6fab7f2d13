"""Bootstrap intervals of scores, and paired comparison of two systems on the same samples."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from magma_jax.typing import Int

DRAWS = 1000

# Why a score of captions has no BLEU-4, see ``by_protocol.nlgeval``.
SHORT_CAPTIONS = "BLEU-4 is left out: most true captions have fewer than four words, so it would say nothing."


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def intervals(
    score: Callable[[Int[np.ndarray, " N"]], dict[str, float]], samples: int, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Percentile bootstrap: the middle 95 % of the scores of ``draws`` sets drawn with replacement.

    Args:
        score: scores by name of the samples at the given rows.
        samples: number of samples, N.
        draws: number of bootstrap sets.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    found = [score(rng.integers(0, samples, samples)) for _ in range(draws)]
    return {
        name: Interval(*(float(q) for q in np.quantile([values[name] for values in found], [0.025, 0.975])))
        for name in found[0]
    }


def notes_on(metrics: Iterable[str]) -> list[str]:
    """Notes to show next to scores of these metrics and their intervals."""
    names = set(metrics)
    if "CIDEr" not in names:
        return []
    notes = ["CIDEr weighs words by their rarity in the whole set, in every draw of the bootstrap too."]
    return notes if "BLEU-4" in names else [*notes, SHORT_CAPTIONS]


class Comparison(NamedTuple):
    """Two systems on the same samples.

    Attributes:
        difference: score of the second minus that of the first.
        interval: 95 % interval of the difference.
        p: two-sided bootstrap probability of a difference this far from zero if there were none.
    """

    difference: float
    interval: Interval
    p: float


def compare(
    first: Callable[[Int[np.ndarray, " N"]], dict[str, float]],
    second: Callable[[Int[np.ndarray, " N"]], dict[str, float]],
    samples: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Paired bootstrap: both systems are scored on the same draws, so the samples' difficulty cancels out."""
    rng = np.random.default_rng(seed)

    def differences(rows: Int[np.ndarray, " N"]) -> dict[str, float]:
        one, two = first(rows), second(rows)
        return {name: two[name] - one[name] for name in one if name in two}

    found = [differences(rng.integers(0, samples, samples)) for _ in range(draws)]
    compared = {}
    for name, difference in differences(np.arange(samples)).items():
        values = np.array([draw[name] for draw in found])
        low, high = (float(q) for q in np.quantile(values, [0.025, 0.975]))
        # One draw is added to each side, so that p from finitely many draws is never zero.
        tail = 1 + min(int((values <= 0).sum()), int((values >= 0).sum()))
        compared[name] = Comparison(difference, Interval(low, high), min(1.0, 2 * tail / (draws + 1)))
    return compared

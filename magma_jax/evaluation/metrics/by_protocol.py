"""Metrics by protocol name.

``METRICS[name](predictions, references)`` takes one prediction and one list of references per sample and returns
``Scores``. The same captions reach CIDEr 0.95 under one protocol and 0.73 under another, so results are stored and
shown with the protocol's name.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np

from magma_jax.evaluation.metrics import java as java_metrics
from magma_jax.evaluation.metrics import vqa
from magma_jax.evaluation.metrics.captions import bleu_counts, bleu_of_counts, cider_d, rouge_l
from magma_jax.evaluation.metrics.ptb import ptb_tokenize
from magma_jax.typing import Float, Int


@dataclasses.dataclass(frozen=True)
class Scores:
    """A set's scores.

    Attributes:
        total: score of the whole set by name. BLEU and ROUGE-L run from 0 to 1, CIDEr from 0 to 10, accuracies from
            0 to 100.
        per_sample: per-sample scores by name, if their mean is the total. Corpus BLEU has none.
        counts: per-sample counts for scores of the whole set that are not means, such as corpus BLEU; None if all
            scores are means.
        of_counts: such scores by name, from summed counts.
    """

    total: dict[str, float]
    per_sample: dict[str, Float[np.ndarray, " N"]]
    counts: Int[np.ndarray, "N columns"] | Float[np.ndarray, "N columns"] | None = None
    of_counts: Callable[[np.ndarray], dict[str, float]] | None = None

    def resampled(self, rows: Int[np.ndarray, " N"]) -> dict[str, float]:
        """The totals of a bootstrap draw of the samples. CIDEr keeps the document frequencies of the whole set."""
        totals = {name: float(values[rows].mean()) for name, values in self.per_sample.items()}
        if self.counts is not None and self.of_counts is not None:
            totals |= self.of_counts(self.counts[rows].sum(0))
        return {name: totals[name] for name in self.total}

    def by_group(self, groups: Sequence[Hashable]) -> dict[Hashable, dict[str, float]]:
        """Means of the per-sample scores for each value of ``groups`` (one per sample), such as question types.

        This does not equal scoring a subset on its own, since CIDEr weights words by the whole set.

        Raises:
            ValueError: not one group per sample.
        """
        samples = len(next(iter(self.per_sample.values())))
        if len(groups) != samples:
            raise ValueError(f"{len(groups)} groups for {samples} samples")
        members: dict[Hashable, list[int]] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        return {
            group: {name: float(values[rows].mean()) for name, values in self.per_sample.items()}
            for group, rows in members.items()
        }


Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], Scores]


def coco(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """BLEU-1 to 4, CIDEr and ROUGE-L on Penn Treebank tokens, lower-cased, without punctuation (coco-caption)."""
    _check(predictions, references)
    return nlgeval(*_tokenized(predictions, references))


def nlgeval(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """The same scores on unprocessed captions, with case and punctuation (nlg-eval, used for MAGMA's table).

    BLEU-n is left out if most samples have no reference of n words: the official program gives about 1e-9 for equal
    captions of three words.
    """
    _check(predictions, references)
    counts = bleu_counts(predictions, references)
    per_sample = {"CIDEr": cider_d(predictions, references), "ROUGE-L": rouge_l(predictions, references)}
    means = {name: float(values.mean()) for name, values in per_sample.items()}
    words = sorted(max(len(caption.split()) for caption in captions) for captions in references)
    longest = words[len(words) // 2]
    bleu = dict(list(_named_bleu(counts.sum(0)).items())[: max(1, longest)])
    return Scores(bleu | means, per_sample, counts, _named_bleu)


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """METEOR 1.5 on the tokens of ``coco``, 0 to 1; needs Java and ``pycocoevalcap``.

    The set's score is computed from summed counts; it is not the mean of the images' scores.
    """
    _check(predictions, references)
    counts = java_metrics.meteor_counts(*_tokenized(predictions, references))
    per_sample = np.array([java_metrics.meteor_of_counts(row) for row in counts])

    def total(counts: np.ndarray) -> dict[str, float]:
        return {"METEOR": java_metrics.meteor_of_counts(counts)}

    return Scores(total(counts.sum(0)), {"METEOR": per_sample}, counts, total)


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """SPICE on the tokens of ``coco``, 0 to 1; needs Java, ``pycocoevalcap`` and Stanford's models."""
    _check(predictions, references)
    per_sample = java_metrics.spice(*_tokenized(predictions, references))
    return Scores({"SPICE": float(per_sample.mean())}, {"SPICE": per_sample})


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Percentage of predictions that equal one of their references exactly (GQA's rule)."""
    return _accuracy(lambda prediction, answers: 100.0 * (prediction in answers), predictions, references)


def exact_match_relaxed(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """``exact_match`` that ignores surrounding space, case and final full stops, on both sides."""

    def relax(text: str) -> str:
        return text.strip().rstrip(".").lower()

    _check(predictions, references)
    return exact_match([relax(p) for p in predictions], [[relax(a) for a in answers] for answers in references])


def _tokenized(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    return (
        [ptb_tokenize(caption) for caption in predictions],
        [[ptb_tokenize(caption) for caption in captions] for captions in references],
    )


def _named_bleu(counts: Int[np.ndarray, " columns"]) -> dict[str, float]:
    return {f"BLEU-{i}": float(score) for i, score in enumerate(bleu_of_counts(counts), start=1)}


def _accuracy(
    score: Callable[[str, Sequence[str]], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> Scores:
    _check(predictions, references)
    values = np.array([score(p, answers) for p, answers in zip(predictions, references, strict=True)])
    return Scores({"accuracy": float(values.mean())}, {"accuracy": values})


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} lists of references")
    if not predictions:
        raise ValueError("nothing to score: the predictions are empty")
    for i, alternatives in enumerate(references):
        if isinstance(alternatives, str) or not alternatives:
            raise ValueError(f"sample {i}: references must be a list of at least one string, got {alternatives!r}")


# For VizWiz the sensible reading is the official rule, which leaves one annotator out by position.
METRICS: MappingProxyType[str, Metric] = MappingProxyType(
    {
        "coco": coco,
        "nlgeval": nlgeval,
        "meteor": meteor,
        "spice": spice,
        "exact_match": exact_match,
        "exact_match_relaxed": exact_match_relaxed,
        "vqa_official": partial(_accuracy, vqa.vqa_official),
        "vqa_always_normalised": partial(_accuracy, vqa.vqa_always_normalised),
        "vqa_before_2021": partial(_accuracy, vqa.vqa_before_2021),
        "vizwiz_by_index": partial(_accuracy, vqa.vqa_official),
        "vizwiz_by_value": partial(_accuracy, vqa.vizwiz_by_value),
    }
)

"""Caption scores over a whole set: BLEU, CIDEr-D and ROUGE-L as coco-caption computes them.

Inputs are strings of space-separated tokens: ``hypotheses[i]`` is scored against ``references[i]``, any number per
image. Tokenization is up to the protocol (``magma_jax.evaluation.metrics.by_protocol``).
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from magma_jax.typing import Float, Int

Ngrams = Counter[tuple[str, ...]]


def bleu_counts(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], max_order: int = 4
) -> Int[np.ndarray, "N columns"]:
    """Per-image counts for corpus BLEU: matched n-grams by order, possible ones by order, the two lengths."""
    rows = np.zeros((len(hypotheses), 2 * max_order + 2), np.int64)
    for row, hypothesis, alternatives in zip(rows, hypotheses, references, strict=True):
        words = hypothesis.split()
        lengths = [len(reference.split()) for reference in alternatives]
        most = Counter()
        for reference in alternatives:
            most |= _ngrams(reference, max_order)
        for ngram, count in _ngrams(hypothesis, max_order).items():
            row[len(ngram) - 1] += min(count, most[ngram])
        row[max_order : 2 * max_order] = [max(0, len(words) - order) for order in range(max_order)]
        row[-2:] = len(words), min(lengths, key=lambda n: (abs(n - len(words)), n))
    return rows


def bleu_of_counts(counts: Int[np.ndarray, " columns"]) -> Float[np.ndarray, " orders"]:
    """Corpus BLEU-1, BLEU-2, ..., 0 to 1, from the summed rows of ``bleu_counts`` (Papineni et al. 2002).

    The brevity penalty sums, over the images, the reference length closest to the hypothesis (the shorter of two
    equally close).
    """
    orders = (len(counts) - 2) // 2
    matched, possible, (length, reference_length) = counts[:orders], counts[orders : 2 * orders], counts[-2:]
    # coco-caption's two constants, which avoid division by zero and zero precision.
    precision = (matched + 1e-15) / (possible + 1e-9)
    scores = np.cumprod(precision) ** (1 / np.arange(1, orders + 1))
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return scores * math.exp(1 - 1 / ratio) if ratio < 1 else scores


def cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " N"]:
    """CIDEr-D of each image, 0 to 10; the set's score is the mean (Vedantam et al. 2015).

    Document frequencies come from the given references: the same captions score differently in another set, and a set
    of one image scores 0.
    """
    counted = [[_ngrams(reference) for reference in alternatives] for alternatives in references]
    images_with = Counter(ngram for alternatives in counted for ngram in set().union(*alternatives))
    log_images = math.log(len(counted)) if counted else 0.0

    def weigh(ngrams: Ngrams) -> tuple[list[dict], list[float], int]:
        vectors = [{} for _ in range(4)]
        for ngram, count in ngrams.items():
            rarity = log_images - math.log(max(1, images_with[ngram]))
            vectors[len(ngram) - 1][ngram] = count * rarity
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
        # As in the reference program, the Gaussian penalty compares numbers of bigrams.
        return vectors, norms, sum(count for ngram, count in ngrams.items() if len(ngram) == 2)

    scores = np.zeros(len(hypotheses))
    for i, (hypothesis, alternatives) in enumerate(zip(hypotheses, counted, strict=True)):
        vectors, norms, length = weigh(_ngrams(hypothesis))
        for ngrams in alternatives:
            others, other_norms, other_length = weigh(ngrams)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * 6.0**2))  # sigma 6: the paper, section 5
            for vector, norm, other, other_norm in zip(vectors, norms, others, other_norms, strict=True):
                if norm and other_norm:
                    common = sum(min(w, other[g]) * other[g] for g, w in vector.items() if g in other)
                    scores[i] += penalty * common / (norm * other_norm)
        scores[i] *= 10 / (4 * len(alternatives))
    return scores


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " N"]:
    """ROUGE-L of each image, 0 to 1; the set's score is the mean (Lin 2004, beta 1.2).

    Best precision and best recall may come from different references. As in the reference program, text is split at
    every single space, so an empty caption is one empty word and equals an empty reference.
    """
    scores = np.zeros(len(hypotheses))
    for i, (hypothesis, alternatives) in enumerate(zip(hypotheses, references, strict=True)):
        words = hypothesis.split(" ")
        others = [reference.split(" ") for reference in alternatives]
        common = [_longest_common_subsequence(words, other) for other in others]
        precision = max(common) / len(words)
        recall = max(n / len(other) for n, other in zip(common, others, strict=True))
        if precision and recall:
            scores[i] = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return scores


def _ngrams(text: str, max_order: int = 4) -> Ngrams:
    words = text.split()
    orders = range(1, max_order + 1)
    return Counter(tuple(words[i : i + n]) for n in orders for i in range(len(words) - n + 1))


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]

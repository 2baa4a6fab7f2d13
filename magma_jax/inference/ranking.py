"""The best of several drawn candidates: by the model's own likelihood, or by a score of images against the text."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from magma_jax.inference.answers import Score


def best_candidates(
    likelihoods: Sequence[float],
    candidates: int,
    texts: Sequence[str],
    images: Callable[[], Sequence[Image.Image]],
    score: Score | None,
) -> list[int]:
    """Places of the best of every ``candidates`` ones that follow each other; of equal ones the first.

    Args:
        likelihoods: the model's own log-probability of each.
        candidates: candidates of a result.
        texts: text of every result.
        images: makes the images of all candidates; called only if a score has to choose.
        score: what decides in place of the likelihoods.

    Raises:
        ValueError: the score gives another number of values than images, or one that is no number.
    """
    starts = range(0, len(likelihoods), candidates)
    if score is None or candidates == 1:
        return [start + int(np.argmax(likelihoods[start : start + candidates])) for start in starts]
    asked = [text for text in texts for _ in range(candidates)]
    values = np.asarray(score(images(), asked), np.float64)
    if values.shape != (len(asked),) or np.isnan(values).any():
        raise ValueError(
            f"score gives {values.tolist()} for {len(asked)} images; it must give a number for each of them"
        )
    return best_candidates(values.tolist(), candidates, texts, images, None)

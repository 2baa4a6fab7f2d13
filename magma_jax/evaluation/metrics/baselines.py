"""Baselines without the right image: shuffled images, and the most frequent answers."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np


def shuffle_images(samples: Sequence[Any], seed: int) -> list[int]:
    """For every sample, the image of another sample of its kind, never its own image.

    If one image makes up more than half of a kind (a single question, say), images come from the whole split.

    Raises:
        ValueError: all samples show the same image.
    """
    rng = np.random.default_rng(seed)
    everything = sorted({int(sample.image) for sample in samples})
    if len(everything) < 2:
        raise ValueError("all samples show the same image; the shuffled baseline needs at least two")
    rank = dict(zip(everything, rng.permutation(len(everything)).tolist(), strict=True))
    members = defaultdict(list)
    for i, sample in enumerate(samples):
        members[sample.kind].append(i)
    shown = [0] * len(samples)
    for group in members.values():
        group = sorted(group, key=lambda i: rank[int(samples[i].image)])
        own = [int(samples[i].image) for i in group]
        most = max(Counter(own).values())
        if 2 * most <= len(group):
            # Equal images are adjacent, so a rotation by the longest run of them replaces every one.
            others = own[most:] + own[:most]
        else:
            others = [int(rng.choice([other for other in everything if other != image])) for image in own]
        for i, other in zip(group, others, strict=True):
            shown[i] = other
    return shown


def most_frequent_answers(samples: Sequence[Any], training: Sequence[Any]) -> list[str]:
    """The most frequent training answer to the same prompt, else to the same kind, else to anything.

    Ties are broken alphabetically: if all training captions differ, the constant caption is simply the first of them.
    """
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for sample in training:
        for key in (("prompt", sample.prompt), ("kind", sample.kind), ()):
            counts[key][sample.answer.strip()] += 1
    commonest = {key: min(answers, key=lambda a: (-answers[a], a)) for key, answers in counts.items()}
    keys = [(("prompt", sample.prompt), ("kind", sample.kind), ()) for sample in samples]
    return [next(commonest[key] for key in options if key in commonest) for options in keys]

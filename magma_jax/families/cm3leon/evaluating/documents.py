"""Which training drawings are shown before a drawing: retrieved, by metadata, at random."""

from collections.abc import Sequence

import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.documents.annotation import open_annotation
from magma_jax.data.openmoji.drawings import Drawing
from magma_jax.families.cm3leon.evaluating.settings import Shown


def shown_rows(
    kind: Shown,
    records: Sequence[Drawing],
    rows: Sequence[int],
    count: int,
    *,
    annotation: str | None,
    seed: int,
) -> list[list[int]]:
    """Rows of up to ``count`` training drawings for each of ``rows``.

    Raises:
        ConfigError: retrieved ones without an annotation. DataError: an unusable annotation.
    """
    training = [record for record in records if record.split == "train"]
    if kind == "none" or not count:
        return [[] for _ in rows]
    if kind == "random":
        rng = np.random.default_rng(seed)
        return [[training[i].index for i in rng.choice(len(training), count, replace=False)] for _ in rows]
    if kind == "oracle":
        return [_oracle(records[row], training, count) for row in rows]
    if annotation is None:
        raise ConfigError("the run has no data.annotation, which says what is retrieved")
    by_id = {record.codepoints: record.index for record in training}
    found = open_annotation(annotation).rows([records[row].codepoints for row in rows], by_id)
    return [one[:count].tolist() for one in found]


def same_name(records: Sequence[Drawing], rows: Sequence[int], shown: Sequence[Sequence[int]]) -> dict[str, float]:
    """Percent of drawings whose first document, or any of whose documents, has their name in other tones."""
    right = [[records[one].base == records[row].base for one in found] for row, found in zip(rows, shown, strict=True)]
    return {
        "first": 100 * float(np.mean([one[:1] == [True] for one in right])),
        "any": 100 * float(np.mean([any(one) for one in right])),
    }


def _oracle(record: Drawing, training: Sequence[Drawing], count: int) -> list[int]:
    """Drawings of the same name, of which the first ones have the left and the right tone between them."""
    others = [one for one in training if one.base == record.base and one is not record]
    others += [one for one in training if one.concept == record.concept and one.base != record.base]
    chosen: list[Drawing] = []
    missing = dict(enumerate(record.tones))

    def score(one: Drawing) -> tuple[bool, int, bool]:
        tones = one.tones if len(one.tones) == len(record.tones) else one.tones * len(record.tones)
        return one.base == record.base, sum(tones[i] == tone for i, tone in missing.items() if i < len(tones)), True

    while others and len(chosen) < count:
        best = max(others, key=score)
        others.remove(best)
        chosen.append(best)
        tones = best.tones if len(best.tones) == len(record.tones) else best.tones * len(record.tones)
        missing = {i: tone for i, tone in missing.items() if i >= len(tones) or tones[i] != tone}
    return [one.index for one in chosen]

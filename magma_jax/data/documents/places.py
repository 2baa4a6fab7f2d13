"""Places of image codes in the grids of their images, read from the ids of a block or prompt alone."""

from collections.abc import Mapping

import numpy as np

from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.typing import Int


def image_places(
    ids: Int[np.ndarray, " S"], layout: VocabLayout, missing: Mapping[int, int] | None = None
) -> Int[np.ndarray, " S"]:
    """Place of every code in its image, also after and in moved spans; -1 for other ids.

    The first occurrence of a sentinel marks a gap, the second begins its contents (``spans``).

    Args:
        ids: they begin outside an image.
        layout: vocabulary.
        missing: number of codes in the gap of a sentinel, for gaps whose contents are not in ``ids``.
    """
    listed = ids.tolist()
    codes, sentinels, texts = layout.image_ids, layout.sentinel_ids, layout.text_ids
    sizes = dict(missing or {})
    seen: set[int] = set()
    for number, one in enumerate(listed):
        if one in sentinels and one in seen:
            end = next((place for place in range(number, len(listed)) if listed[place] == layout.eoss), len(listed))
            held = sum(other in codes for other in listed[number:end])
            sizes[one] = max(held, sizes.get(one, 0))
        elif one in sentinels:
            seen.add(one)
    places = np.full(len(ids), -1, np.int32)
    starts: dict[int, int] = {}
    place = 0
    for number, one in enumerate(listed):
        if one in codes:
            places[number] = place
            place += 1
        elif one in sentinels:
            if one in starts:
                place = starts[one]
            else:
                starts[one] = place
                place += sizes.get(one, 0)
        elif one not in texts:
            place = 0
    return places

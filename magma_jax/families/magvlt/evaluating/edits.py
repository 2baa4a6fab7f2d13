"""In-painting tasks: a real drawing of which one attribute is to change, and the codes that may change for it."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from magma_jax.data.openmoji.drawings import Drawing, tones_of
from magma_jax.evaluation.drawings import NEAR, SKIN
from magma_jax.typing import Bool, UInt8

# Part of the height, from the top, in which hair and beard are; long hair lies on the shoulders.
HEAD = 0.75
_HAIR = re.compile(r"^(man|woman|person) (bald|beard|.* hair)$")


@dataclasses.dataclass(frozen=True)
class Edit:
    """A drawing to change.

    Attributes:
        attribute: ``tone`` or ``hair``.
        source: row of the drawing to change.
        target: row of the real drawing that it should become; its text is the prompt.
        places: (I,) codes to draw anew. They follow from the source alone.
    """

    attribute: str
    source: int
    target: int
    places: Bool[np.ndarray, " I"]


def edits_of(
    records: Sequence[Drawing], images: UInt8[np.ndarray, "N H W 3"], rows: Sequence[int], grid: tuple[int, int]
) -> list[Edit]:
    """An edit for each drawing of ``rows`` that differs from a training drawing in skin tone or hair alone.

    For a tone, the codes with a pixel of the source's skin colour are drawn anew; for hair, the upper three quarters.
    """
    learned = [record for record in records if record.split == "train"]
    found = []
    for row in rows:
        target = records[int(row)]
        tones = tones_of(target)
        sources = [drawing for drawing in learned if len(tones) == 1 and drawing.base == target.base]
        sources = [drawing for drawing in sources if len(tones_of(drawing)) == 1 and drawing.tones != target.tones]
        if sources:
            source = sources[len(found) % len(sources)]
            colour = np.array(SKIN[tones_of(source)[0]], np.float32)
            near = np.linalg.norm(images[source.index].astype(np.float32) - colour, axis=-1) <= NEAR
            found.append(Edit("tone", source.index, target.index, _codes(near, grid)))
        if _HAIR.match(target.base):
            sources = [
                d for d in learned if _HAIR.match(d.base) and (d.gender, d.tones) == (target.gender, target.tones)
            ]
            sources = [drawing for drawing in sources if drawing.base != target.base]
            if sources:
                source = sources[len(found) % len(sources)]
                upper = np.zeros(grid, bool)
                upper[: round(HEAD * grid[0])] = True
                found.append(Edit("hair", source.index, target.index, upper.reshape(-1)))
    return [edit for edit in found if edit.places.any()]


def _codes(pixels: Bool[np.ndarray, "H W"], grid: tuple[int, int]) -> Bool[np.ndarray, " I"]:
    """Codes with any of the pixels."""
    rows, columns = grid
    height, width = pixels.shape
    return pixels.reshape(rows, height // rows, columns, width // columns).any((1, 3)).reshape(-1)

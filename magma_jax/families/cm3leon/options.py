"""Options of a drawing, beside those of every family."""

import dataclasses
from typing import Literal

from magma_jax.inference.answers import ImageOptions

# What the stream without the prompt is given. sentinel: a sentinel in place of the text, and no retrieved documents.
# documents: the retrieved documents and no text at all, as in the authors' script.
Null = Literal["sentinel", "documents"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawOptions(ImageOptions):
    """Options of a drawing.

    Attributes:
        image_guidance: weight of guidance by the image of an edit; ``guidance`` is that of the instruction.
        null: what the stream without the prompt is given.
        interval: share of an image, from and to, in which guidance applies.
        cd_k: k of contrastive decoding (CD-K) in place of guidance; 0 for guidance.
        contrasted: how many of the candidates are drawn by CD-K, the last ones; the others are guided and drawn by
            top-p, so that both are in one pool. None for all with ``cd_k``.
        cd_alpha: tokens less likely than this share of the k-th likeliest one are left out.
        amateur_temperature: temperature of the stream that CD-K subtracts.
    """

    image_guidance: float = 1.5
    null: Null = "sentinel"
    interval: tuple[float, float] = (0.0, 1.0)
    cd_k: int = 0
    contrasted: int | None = None
    cd_alpha: float = 0.5
    amateur_temperature: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.image_guidance < float("inf"):
            raise ValueError(f"image_guidance must be a number of at least 0, got {self.image_guidance}")
        if self.null not in ("sentinel", "documents"):
            raise ValueError(f"null {self.null!r} is none of sentinel, documents")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"interval must be two ascending shares between 0 and 1, got {self.interval}")
        if self.cd_k < 0:
            raise ValueError(f"cd_k must be at least 0, got {self.cd_k}")
        if self.contrasted is not None and not (self.cd_k and 0 <= self.contrasted <= self.candidates):
            raise ValueError(
                f"contrasted {self.contrasted}: give cd_k, and a number up to that of the candidates, {self.candidates}"
            )
        if not 0 < self.cd_alpha <= 1:
            raise ValueError(f"cd_alpha must be above 0 and at most 1, got {self.cd_alpha}")
        if not 0 < self.amateur_temperature < float("inf"):
            raise ValueError(f"amateur_temperature must be a number above 0, got {self.amateur_temperature}")

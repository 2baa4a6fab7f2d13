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
        cd_alpha: of CD-K: tokens less likely than this share of the k-th likeliest one are left out.
        amateur_temperature: temperature of the stream that CD-K subtracts.
    """

    image_guidance: float = 1.5
    null: Null = "sentinel"
    interval: tuple[float, float] = (0.0, 1.0)
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
        if not 0 < self.cd_alpha <= 1:
            raise ValueError(f"cd_alpha must be above 0 and at most 1, got {self.cd_alpha}")
        if not 0 < self.amateur_temperature < float("inf"):
            raise ValueError(f"amateur_temperature must be a number above 0, got {self.amateur_temperature}")

"""Configs of tasks of images; everything that affects a score is a field, and is stored with the result."""

import dataclasses
from types import MappingProxyType
from typing import Any, Literal

from magma_jax.config import to_dict

# Networks whose features are compared. Only scores of inception are comparable with published ones.
Net = Literal["efficientnet_lite0", "inception"]


@dataclasses.dataclass(frozen=True)
class ImageTaskConfig:
    """One evaluation: an image of the first caption of every record, beside the record's own image.

    Attributes:
        name: name of the results.
        data: dataset folder written by ``python -m magma_jax.data convert``; None for the run's own data.
        split: split of the run's own data.
        limit: maximum number of captions, evenly spaced; None for all.
        image_size: pixels per side of both sets: real images are resized and cropped to it, drawn ones resized.
        net: network whose features are compared.
        weights: file of the network's weights, for ``inception``.
        splits: parts of the Inception score.
        seed: seed of every drawing.
        clip: file of a CLIP, OpenAI's or open_clip's, for the CLIP score; None for no such score.
        candidates: images drawn for each caption, of which the best is scored.
        rerank: which is the best: by the model's own likelihood of the caption, or by ``clip``.
        guidance: factor s of ``u + s (c - u)``; 1 for none.
        temperature: first and last value of a line over the steps; None for the family's own.
        top_p: draws from the likeliest tokens of this mass.
        steps: steps of a masked model; None for the family's own.
    """

    name: str
    data: str | None = None
    split: str = "test"
    limit: int | None = 30_000
    image_size: int = 256
    net: Net = "efficientnet_lite0"
    weights: str | None = None
    splits: int = 10
    seed: int = 0
    clip: str | None = None
    candidates: int = 1
    rerank: Literal["model", "clip"] = "model"
    guidance: float = 1.0
    temperature: tuple[float, float] | None = None
    top_p: float = 1.0
    steps: int | None = None

    def __post_init__(self):
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"limit must be at least 2, got {self.limit}: sets of images are compared")
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, got {self.image_size}")
        if self.splits < 1:
            raise ValueError(f"splits must be at least 1, got {self.splits}")
        if self.net == "inception" and self.weights is None:
            raise ValueError("net inception needs its file: set weights")
        if self.net != "inception" and self.weights is not None:
            raise ValueError(f"weights: {self.net} has those of an installed package; leave it out")

        if self.rerank == "clip" and self.clip is None:
            raise ValueError("rerank clip needs the file of a CLIP: set clip")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that differ from the task's defaults; plain JSON values."""
        usual = to_dict(IMAGE_TASKS.get(self.name, self))
        places = ("name", "data", "weights", "clip")
        return {name: value for name, value in to_dict(self).items() if name not in places and value != usual[name]}


IMAGE_TASKS: MappingProxyType[str, ImageTaskConfig] = MappingProxyType(
    {
        # As in the papers: 30,000 captions of COCO's validation images of 2014.
        "coco_30k": ImageTaskConfig("coco_30k"),
        # A run's own test split.
        "own_drawings": ImageTaskConfig("own_drawings", limit=None, image_size=64),
    }
)

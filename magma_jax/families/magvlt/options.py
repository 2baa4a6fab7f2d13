"""Options of MAGVLT's loss; every ablation of the paper (tables 6 and 7) is a value of one of them."""

import dataclasses
from typing import ClassVar, Literal

from magma_jax.nn.stack import Remat

# Tasks of a batch: text to image, image to text, and both modalities masked.
TEXT_TO_IMAGE, IMAGE_TO_TEXT, BOTH = range(3)

# Places that the second pass of UnrollMask masks: drawn anew among all, or among those of the first pass.
UnrollMask = Literal["independent", "nested"]
# Text beside the image whose text's length is predicted.
LengthText = Literal["own", "dummy"]


@dataclasses.dataclass(frozen=True)
class MagvltOptions:
    """Options of the loss; the defaults are the released configs'.

    Attributes:
        task_weights: shares of batches of the tasks text to image, image to text, and both; see ``batch["task"]``.
        image_targets: masked codes of an image that its loss is the mean of, drawn anew for each batch; 0 for all of
            them, as in the original. A small model spends much of its time on the head.
        blank_images: share of the images that are masked as a whole instead of by a random share; not the original's.
            Then the text alone says what to draw, which small models learn last.
        label_smoothing: of the token losses; the length has none.
        length_weight: weight of the length's loss (TL); 0 leaves it out of the gradient.
        length_text: text that the length is learned beside: the image's ``own``, as in the original, whose tokens the
            length head then learns to count; or the ``dummy`` that inference shows, which takes a further pass.
        unroll_weight: weight of the step-unrolled loss (UnrollMask); 0 saves its pass.
        unroll_mask: which places its second pass masks.
        mixsel_weight: weight of the loss on mixed contexts (MixSel); 0 saves its pass.
        independent_ratios: whether the joint task draws the masked shares of image and text apart. By default one draw
            gives both, in opposite directions.
        caption_dropout: share of the texts that text-to-image batches leave empty, for guidance; not the original's.
        activations: dtype of the activations.
        remat: remat policy of the layers, see ``nn.stack``.
    """

    task_weights: tuple[float, float, float] = (8.0, 1.0, 1.0)
    image_targets: int = 0
    blank_images: float = 0.0
    label_smoothing: float = 0.1
    length_weight: float = 0.01
    length_text: LengthText = "own"
    unroll_weight: float = 1.0
    unroll_mask: UnrollMask = "independent"
    mixsel_weight: float = 0.5
    independent_ratios: bool = False
    caption_dropout: float = 0.0
    activations: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"

    may_change: ClassVar[tuple[str, ...]] = ("remat",)
    adds_up: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.blank_images <= 1:
            raise ValueError(f"loss: blank_images must be from 0 to 1, got {self.blank_images}")
        for name in ("label_smoothing", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"loss: {name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("length_weight", "unroll_weight", "mixsel_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss: {name} must not be negative, got {getattr(self, name)}")
        if self.image_targets < 0:
            raise ValueError(f"loss: image_targets must not be negative, got {self.image_targets}")
        if min(self.task_weights) < 0 or not sum(self.task_weights) > 0:
            raise ValueError(f"loss: task_weights must not be negative, and one above 0, got {self.task_weights}")

    @property
    def tasks(self) -> tuple[int, ...]:
        """Tasks with a share; the step has a branch for each."""
        return tuple(task for task, weight in enumerate(self.task_weights) if weight)

    def for_validation(self) -> "MagvltOptions":
        """The options for validation: the same."""
        return self

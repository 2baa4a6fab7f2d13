"""Losses of MAGVLT: masked tokens of each modality, and the length of the text."""

import dataclasses
from collections.abc import Callable, Collection
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.families.magvlt.masking import draw_masks
from magma_jax.models.magvlt.layout import Order
from magma_jax.models.magvlt.model import Canvas, MagvltModel, Modality, canvas_of
from magma_jax.nn.stack import Remat
from magma_jax.training.step.cross_entropy import cross_entropy
from magma_jax.training.step.terms import Term, Terms
from magma_jax.training.step.train_step import Batch
from magma_jax.typing import IGNORED, Array, PRNGKey

# Tasks of a batch: text to image, image to text, and both modalities masked.
TEXT_TO_IMAGE, IMAGE_TO_TEXT, BOTH = range(3)


@dataclasses.dataclass(frozen=True)
class MagvltOptions:
    """Options of the loss; the defaults are the released configs'.

    Attributes:
        label_smoothing: of the token losses; the length has none.
        length_weight: weight of the length's loss.
        independent_ratios: whether the joint task draws the masked shares of image and text apart. By default one draw
            gives both, in opposite directions.
        remat: remat policy of the layers, see ``nn.stack``.
    """

    label_smoothing: float = 0.1
    length_weight: float = 0.01
    independent_ratios: bool = False
    remat: Remat = "none"

    may_change: ClassVar[tuple[str, ...]] = ("remat",)
    adds_up: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss: label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        if self.length_weight < 0:
            raise ValueError(f"loss: length_weight must not be negative, got {self.length_weight}")

    def for_validation(self) -> "MagvltOptions":
        """The options for validation: the same."""
        return self


class Totals(NamedTuple):
    """Sums of one pass: the losses, and how many masked tokens and lengths are predicted."""

    image: Array
    text: Array
    length: Array
    image_right: Array
    text_right: Array
    length_right: Array


def magvlt_loss(model: MagvltModel, batch: Batch, key: PRNGKey | None, *, options: MagvltOptions) -> Terms:
    """Terms of one batch, whose rows have the same task.

    Args:
        model: the model.
        batch: ``image`` (B, I) codes; ``text`` (B, T); ``lengths`` (B,), end token included; ``task`` (B,), equal in
            all rows and on all hosts.
        key: feeds masks and dropout; None for fixed masks without dropout.
        options: see ``MagvltOptions``.

    Returns:
        ``image`` and ``text``, over the masked tokens of the task's modalities; ``length``, over rows in which the
        image comes first; and the accuracy of each, with weight 0.
    """
    config, lengths, task = model.config, batch["lengths"], batch["task"][0]
    mask_key, dropout_key = (jax.random.key(0), None) if key is None else jax.random.split(key)
    masks = draw_masks(
        mask_key,
        lengths,
        config.image_positions,
        config.text_positions,
        independent=options.independent_ratios,
    )
    # Counts are outside of the branches: accumulation asks for them alone, without a pass through the model.
    canvas = canvas_of(
        batch["image"],
        batch["text"],
        lengths,
        image_masked=masks.image & (task != IMAGE_TO_TEXT),
        text_masked=masks.text & (task != TEXT_TO_IMAGE),
    )
    counts = {
        "image": canvas.image_masked.sum(dtype=jnp.int32),
        "text": canvas.text_masked.sum(dtype=jnp.int32),
        "length": jnp.where(task == TEXT_TO_IMAGE, 0, jnp.int32(len(lengths))),
    }

    def branch(order: Order, *predicted: Modality) -> Callable[[], Totals]:
        return lambda: pass_totals(model, order, canvas, predicted, dropout_key=dropout_key, options=options)

    totals = jax.lax.switch(
        task,
        (branch("text_first", "image"), branch("image_first", "text"), branch("image_first", "image", "text")),
    )
    weights = {"image": 1.0, "text": 1.0, "length": options.length_weight}
    terms = {name: Term(getattr(totals, name), counts[name], weight) for name, weight in weights.items()}
    right = {f"{name}_accuracy": Term(getattr(totals, f"{name}_right"), counts[name], 0.0) for name in weights}
    return terms | right


def pass_totals(
    model: MagvltModel,
    order: Order,
    canvas: Canvas,
    predicted: Collection[Modality],
    *,
    dropout_key: PRNGKey | None,
    options: MagvltOptions,
) -> Totals:
    """Sums of one pass over the masked tokens of the ``predicted`` modalities, and over lengths if the image is first.

    The head of a modality that is not predicted is not computed.
    """
    hidden = model.hidden(order, canvas, dropout_key=dropout_key, remat=options.remat)
    sums = {name: jnp.zeros(()) for name in ("image", "text", "length")}
    right = {name: jnp.zeros((), jnp.int32) for name in sums}
    for name in predicted:
        labels = jnp.where(getattr(canvas, f"{name}_masked"), getattr(canvas, name), IGNORED)
        sums[name], _, right[name] = cross_entropy(
            lambda h, name=name: model.logits(h, name),
            getattr(hidden, name),
            labels,
            label_smoothing=options.label_smoothing,
        )
    if order == "image_first":
        classes = canvas.text_lengths[:, None] - 1
        sums["length"], _, right["length"] = cross_entropy(model.length_logits, hidden.bot[:, None], classes)
    return Totals(**sums, **{f"{name}_right": value for name, value in right.items()})

"""Losses of MAGVLT: masked tokens of each modality, the length of the text, and both helper losses.

A batch has one task. Its loss takes up to three passes: over the masked batch; over the same batch with the first
pass's guesses in place of its masks and new masks among them (UnrollMask); and over mixed contexts (MixSel). A further
one over images beside the dummy text of the length prediction is an option.

A causal model has one pass, nothing is masked, and every token of the second modality is predicted from those before.
A model with classes has another loss, see ``classifying``.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.families.magvlt.classifying import class_loss
from magma_jax.families.magvlt.masking import Masks, draw_masks, row_keys
from magma_jax.families.magvlt.options import BOTH, IMAGE_TO_TEXT, TEXT_TO_IMAGE, MagvltOptions
from magma_jax.models.magvlt.layout import Order
from magma_jax.models.magvlt.model import Canvas, Hidden, MagvltModel, Modality, canvas_of, untold
from magma_jax.training.step.cross_entropy import cross_entropy
from magma_jax.training.step.draw_labels import draw_labels
from magma_jax.training.step.terms import Term, Terms
from magma_jax.training.step.train_step import Batch
from magma_jax.typing import IGNORED, Array, PRNGKey

# Order and predicted modalities of each task.
TASKS: dict[int, tuple[Order, tuple[Modality, ...]]] = {
    TEXT_TO_IMAGE: ("text_first", ("image",)),
    IMAGE_TO_TEXT: ("image_first", ("text",)),
    BOTH: ("image_first", ("image", "text")),
}
# Random streams of a row's seed.
MASK, GUESS, MIXSEL_MASK = range(3)
# Number of the pass beside the dummy text, whose dropout has a key of its own; the others are 0 to 2.
DUMMY_PASS = 3


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
        batch: ``codes`` (B, I); ``tokens`` (B, T); ``lengths`` (B,), end token included; ``seeds`` (B,), which the
            masks follow from; ``task`` (B,), equal in all rows and on all hosts; with UnrollMask ``unroll_seeds`` (B,)
            of guesses and second masks; and with MixSel what ``mixing.mixed`` makes.
        key: feeds dropout; None for none.
        options: see ``MagvltOptions``.

    Returns:
        ``image`` and ``text``, over the masked tokens of the task's modalities, in a causal model over all of them;
        ``length``, over rows in which the image comes first, not of a causal model; the accuracy of each, with weight
        0; and ``unroll_...`` and ``mixsel_...`` of the others. With classes the terms of ``class_loss``.
    """
    if model.config.classes:
        return class_loss(model, batch, key, options=options)
    task, seeds = batch["task"][0], batch["seeds"]
    first = batch["codes"], batch["tokens"], batch["lengths"]
    words = jnp.arange(first[1].shape[1]) < first[2][:, None]
    everywhere = jnp.ones(first[0].shape, bool)

    causal = model.config.causal

    def masks(keys: Array, image: Array, text: Array, *, nested: bool = False) -> Masks:
        drawn = Masks(image, text, image)
        if not causal:
            drawn = draw_masks(
                keys,
                image,
                text,
                independent=options.independent_ratios,
                nested=nested,
                limit=options.image_targets,
                blank=options.blank_images,
            )
        # Counts are outside of the branches: accumulation asks for them alone, without a pass through the model.
        of_image = task != IMAGE_TO_TEXT
        return Masks(drawn.image & of_image, drawn.text & (task != TEXT_TO_IMAGE), drawn.targets & of_image)

    drawn = {"": masks(row_keys(seeds, MASK), everywhere, words)}
    if options.unroll_weight and options.unroll_mask == "nested":
        drawn["unroll_"] = masks(row_keys(batch["unroll_seeds"], MASK), drawn[""].image, drawn[""].text, nested=True)
    elif options.unroll_weight:
        drawn["unroll_"] = masks(row_keys(batch["unroll_seeds"], MASK), everywhere, words)
    mixed = None
    if options.mixsel_weight:
        drawn["mixsel_"] = masks(row_keys(seeds, MIXSEL_MASK), batch["mixed_image_places"], batch["mixed_text_places"])
        mixed = canvas_of(
            batch["mixed_codes"],
            batch["mixed_tokens"],
            batch["mixed_lengths"],
            image_masked=drawn["mixsel_"].image,
            text_masked=drawn["mixsel_"].text,
            selectors=batch["selectors"],
        )
    canvas = canvas_of(*first, image_masked=drawn[""].image, text_masked=drawn[""].text)
    keys = [None] * 3 if key is None else list(jax.random.split(key, 3))

    def branch(order: Order, predicted: tuple[Modality, ...]) -> Callable[[], dict[str, Totals]]:
        def run() -> dict[str, Totals]:
            def totals(hidden: Hidden, canvas: Canvas, kind: str = "", **bot: Any) -> Totals:
                targets = drawn[kind].targets
                return hidden_totals(model, hidden, canvas, predicted, targets=targets, options=options, **bot)

            def hidden_of(canvas: Canvas, key: PRNGKey | None) -> Hidden:
                return model.hidden(
                    order, canvas, dtype=jnp.dtype(options.activations), dropout_key=key, remat=options.remat
                )

            hidden = hidden_of(canvas_of(*first) if causal else canvas, keys[0])
            bot = hidden.bot if order == "image_first" and not causal else None
            if bot is not None and options.length_text == "dummy":
                lengths = jnp.full_like(canvas.text_lengths, model.config.dummy_length)
                alone = untold(model.config, canvas.image, canvas.image_masked, lengths)
                bot = hidden_of(alone, None if key is None else jax.random.fold_in(key, DUMMY_PASS)).bot
            found = {"": totals(hidden, canvas, bot=bot)}
            if "unroll_" in drawn:
                guessed = unrolled(
                    model, canvas, hidden, predicted, row_keys(batch["unroll_seeds"], GUESS), drawn["unroll_"]
                )
                # The guesses are seen, the truth is predicted.
                truth = canvas._replace(image_masked=drawn["unroll_"].image, text_masked=drawn["unroll_"].text)
                found["unroll_"] = totals(hidden_of(guessed, keys[1]), truth, "unroll_")
            if mixed is not None:
                found["mixsel_"] = totals(hidden_of(mixed, keys[2]), mixed, "mixsel_")
            return found

        return run

    branches = [branch(*TASKS[number]) for number in options.tasks]
    place = sum((task > number).astype(jnp.int32) for number in options.tasks[:-1]) if branches[1:] else 0
    totals = jax.lax.switch(place, branches) if branches[1:] else branches[0]()
    weights = {"": 1.0, "unroll_": options.unroll_weight, "mixsel_": options.mixsel_weight}
    terms: dict[str, Any] = {}
    for kind, masks_ in drawn.items():
        for name, counted in (("image", masks_.targets), ("text", masks_.text)):
            count = counted.sum(dtype=jnp.int32)
            terms[kind + name] = Term(getattr(totals[kind], name), count, weights[kind])
            terms[f"{kind}{name}_accuracy"] = Term(getattr(totals[kind], f"{name}_right"), count, 0.0)
    if causal:
        return terms
    count = jnp.where(task == TEXT_TO_IMAGE, 0, jnp.int32(len(seeds)))
    terms["length"] = Term(totals[""].length, count, options.length_weight)
    terms["length_accuracy"] = Term(totals[""].length_right, count, 0.0)
    return terms


def pass_totals(
    model: MagvltModel,
    order: Order,
    canvas: Canvas,
    predicted: Collection[Modality],
    *,
    dropout_key: PRNGKey | None,
    options: MagvltOptions,
) -> Totals:
    """Sums of one pass over masked tokens of the ``predicted`` modalities, with the image first also over lengths."""
    hidden = model.hidden(order, canvas, dropout_key=dropout_key, remat=options.remat)
    bot = hidden.bot if order == "image_first" else None
    return hidden_totals(model, hidden, canvas, predicted, options=options, bot=bot)


def hidden_totals(
    model: MagvltModel,
    hidden: Hidden,
    canvas: Canvas,
    predicted: Collection[Modality],
    *,
    options: MagvltOptions,
    targets: Array | None = None,
    bot: Array | None = None,
) -> Totals:
    """Sums of one pass over the masked tokens of the ``predicted`` modalities, and over lengths.

    Lengths are predicted from ``bot`` (B, D), states at BOT; None for no lengths. Of images only ``targets`` (B, I)
    count, if given. The head of a modality that is not predicted is not computed.
    """
    sums = {name: jnp.zeros(()) for name in ("image", "text", "length")}
    right = {name: jnp.zeros((), jnp.int32) for name in sums}
    for name in predicted:
        places = getattr(canvas, f"{name}_masked") if name == "text" or targets is None else targets
        states, labels = getattr(hidden, name), jnp.where(places, getattr(canvas, name), IGNORED)
        if name == "image" and 0 < options.image_targets < labels.shape[1]:
            chosen = jnp.argsort(~places, axis=1, stable=True)[:, : options.image_targets]
            states, labels = (jnp.take_along_axis(x, i, 1) for x, i in ((states, chosen[..., None]), (labels, chosen)))
        sums[name], _, right[name] = cross_entropy(
            lambda h, name=name: model.logits(h, name),
            states,
            labels,
            label_smoothing=options.label_smoothing,
        )
    if bot is not None:
        classes = canvas.text_lengths[:, None] - 1
        sums["length"], _, right["length"] = cross_entropy(model.length_logits, bot[:, None], classes)
    return Totals(**sums, **{f"{name}_right": value for name, value in right.items()})


def unrolled(
    model: MagvltModel, canvas: Canvas, hidden: Hidden, predicted: Collection[Modality], keys: Array, masks: Masks
) -> Canvas:
    """The canvas with its masked tokens drawn from the model's guesses, without gradients, and masked anew."""
    tokens = {"image": canvas.image, "text": canvas.text}
    for name in predicted:
        drawn = draw_labels(lambda h, name=name: model.logits(h, name), getattr(hidden, name), keys)
        tokens[name] = jnp.where(getattr(canvas, f"{name}_masked"), drawn, tokens[name])
    return canvas._replace(**tokens, image_masked=masks.image, text_masked=masks.text)

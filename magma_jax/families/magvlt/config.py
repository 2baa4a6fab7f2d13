"""Parts of a run that follow from a MAGVLT model: data settings, batch shapes, counts, operations."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from magma_jax.data.code_pairs import CodePairsConfig
from magma_jax.data.openmoji.pairs import OpenmojiPairsConfig
from magma_jax.families.magvlt.options import BOTH, MagvltOptions
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import Program
from magma_jax.training.step.flops import StepFlops, attention_flops, matrix_flops

# Vectors per row and pass that a path's weights multiply. The table's product with the head is counted below, since it
# has the rows of one modality.
INPUTS = (
    (re.compile(r"image_tokenizer/.*|.*(ln_\d|head_norm)/weight"), None),
    (re.compile(r"(wte|special|(image|text|special)_positions|length_head)/weight"), None),
    (re.compile(r"layers/.*weight"), "positions"),
    (re.compile(r"class_head/weight"), "row"),
    (re.compile(r"head_proj/weight"), "predicted"),
    (re.compile(r"(caption|context)_proj/weight"), "caption"),
    (re.compile(r"(join|part)_proj/weight"), "places"),
)


def complete(config: RunConfig) -> RunConfig:
    """The config with data settings filled in from the model.

    Raises:
        ValueError: the data settings do not fit the model, or images have no trained tokenizer.
    """
    model, data = config.model, config.data
    if model.tokenizer is not None and not (config.base or "image_tokenizer" in config.weights):
        raise ValueError(
            "weights.image_tokenizer: the model's image tokenizer is frozen, so it needs trained weights; name the "
            "folder of a VQ-GAN, or a file of one"
        )
    if model.causal:
        _check_causal(config.loss)
    names = data.classes if isinstance(data, CodePairsConfig) else ()
    # A config without names is complete, so that its model can be planned; see ``prepare``.
    if names and len(names) != model.classes:
        raise ValueError(f"model.classes is {model.classes}, but data.classes names {len(names)} answers")
    if model.classes:
        _check_classes(config.loss)
    wanted = {"length": model.text_positions}
    if isinstance(data, OpenmojiPairsConfig):
        if model.tokenizer is None:
            raise ValueError("model.tokenizer: data of images need a model with an image tokenizer")
        wanted["image_size"] = model.tokenizer.image_size
    for name, size in wanted.items():
        if getattr(data, name) not in (None, size):
            raise ValueError(f"data.{name} is {getattr(data, name)}, but the model has {size}; leave it out")
    return dataclasses.replace(config, data=dataclasses.replace(data, **wanted))


def _check_causal(loss: MagvltOptions) -> None:
    """Raises ValueError for losses that need masks or a length."""
    wanted = {"unroll_weight": 0.0, "mixsel_weight": 0.0, "length_weight": 0.0, "image_targets": 0, "blank_images": 0.0}
    if any(getattr(loss, name) != value for name, value in wanted.items()) or loss.task_weights[BOTH]:
        settings = " ".join(f"loss.{name}={value}" for name, value in wanted.items())
        raise ValueError(
            f"model.causal: has neither masks nor a length to predict; set {settings} and the last of "
            "loss.task_weights to 0"
        )


def _check_classes(loss: MagvltOptions) -> None:
    """Raises ValueError for losses that a classifier of answers has not."""
    wanted = {"unroll_weight": 0.0, "mixsel_weight": 0.0, "length_weight": 0.0, "task_weights": (0.0, 1.0, 0.0)}
    if any(getattr(loss, name) != value for name, value in wanted.items()):
        settings = " ".join(f'"loss.{name}={value}"' for name, value in wanted.items())
        raise ValueError(f"model.classes: questions have the loss of their answers alone; set {settings}")


def batch_shapes(program: Program) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of a run's batches, as ``families.magvlt.prepare`` makes them."""
    model, rows = program.config.model, program.config.batch_size
    codes, tokens = (rows, model.image_positions), (rows, model.text_positions)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "codes": (codes, jnp.int32),
        "tokens": (tokens, jnp.int32),
        **dict.fromkeys(("lengths", "labels" if model.classes else "task"), ((rows,), jnp.int32)),
    }
    if model.classes:
        return shapes
    shapes["seeds"] = (rows,), jnp.uint32
    if program.config.loss.mixsel_weight:
        shapes |= {
            "mixed_codes": (codes, jnp.int32),
            "mixed_tokens": (tokens, jnp.int32),
            **dict.fromkeys(("mixed_lengths", "selectors"), ((rows,), jnp.int32)),
            "mixed_image_places": (codes, jnp.bool_),
            "mixed_text_places": (tokens, jnp.bool_),
        }
    if program.config.loss.unroll_weight:
        shapes["unroll_seeds"] = ((rows,), jnp.uint32)
    return shapes


def count(batch: Mapping[str, np.ndarray], pad_id: int) -> tuple[int, int]:
    """Samples of a batch, and their codes and text tokens, each once."""
    rows, codes = batch["codes"].shape
    return rows, rows * codes + int(batch["lengths"].sum())


def base_may_differ(base: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields in which a base may differ: how the model is run and stored, and an added classifier."""
    names = ("dtype", "attention_dropout", "residual_dropout")
    return names if base.get("classes") else (*names, "classes")


def step_flops(
    config: MagvltConfig,
    shapes: Mapping[str, Any],
    labels: Mapping[str, str],
    batch: Mapping[str, tuple[int, ...]],
    options: MagvltOptions,
) -> StepFlops:
    """Operations of a step of the task text to image, see ``training.step.flops``: most steps are, by default.

    With classes those of the pass that the classifier reads.

    Every helper loss that the batch is prepared for takes a further pass.
    """
    rows, codes = batch["codes"]
    unrolled = "unroll_seeds" in batch
    # UnrollMask draws all masked codes of the first pass, the losses take some.
    predicted = 0 if config.classes else min(options.image_targets or codes, codes)
    passes = 1 + unrolled + ("mixed_codes" in batch)
    frozen, trained = matrix_flops(
        shapes,
        labels,
        INPUTS,
        {"positions": config.length, "predicted": predicted, "places": config.image_places, "caption": 1, "row": 1},
    )
    head = 2 * predicted * config.width * config.image_rows
    # The guesses that UnrollMask draws take the head's forward pass once more, over all codes.
    guesses = unrolled * 2 * codes * config.width * (config.image_rows + config.width)
    attention = attention_flops(config.width, config.layers, config.length)
    return StepFlops(
        frozen=rows * passes * frozen,
        trained=rows * (passes * (trained + 3 * head) + guesses),
        attention=rows * passes * attention,
        encoder=0,
    )

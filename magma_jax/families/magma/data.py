"""What a run of MAGMA takes from its model, and how its batches look."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from magma_jax.training.image_features import features_are_fixed
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import Program


def complete(config: RunConfig) -> RunConfig:
    """The config with settings of its data that follow from the model, unless they are given.

    Raises:
        ValueError: data that do not fit the model.
    """
    data, model = config.data, config.model
    if data.pack > 1 and config.loss.batch_norm == "batch":
        raise ValueError("rows with data.pack have empty places for images, which loss.batch_norm=batch would count")
    if data.name != "folders":
        return config
    if len(data.classes) != model.classes:
        raise ValueError(f"data.classes names {len(data.classes)} classes, but model.classes is {model.classes}")
    data = dataclasses.replace(
        data,
        image_size=model.encoder.image_size,
        augment=data.augment or ("random_crop" if model.encoder.kind == "nf_resnet" else "none"),
        tokenizer=data.tokenizer or config.base or "gpt2",
    )
    return dataclasses.replace(config, data=data)


def batch_shapes(program: Program) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The longest batch of a run, as ``data.batches`` and ``training.image_features`` make it."""
    config, encoder = program.config, program.config.model.encoder
    rows, length = config.batch_size, config.data.length
    shapes: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(("tokens", "labels"), ((rows, length), jnp.int32))
    images: tuple[int, ...] = (rows,)
    if config.data.pack > 1:
        shapes |= dict.fromkeys(("segments", "positions"), ((rows, length), jnp.int32))
        images = (rows, config.data.pack)
    if features_are_fixed(program) and config.data.name != "folders":
        grid = (encoder.channels,) if encoder.positions is None else (encoder.positions, encoder.channels)
        shapes["features"] = ((*images, *grid), jnp.float32)
    else:
        shapes["images"] = ((*images, encoder.image_size, encoder.image_size, 3), jnp.uint8)
    return shapes

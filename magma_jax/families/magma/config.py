"""Parts of a run that follow from a MAGMA model: groups of parameters, data settings, batch shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from magma_jax.data.folder_dataset import FoldersConfig
from magma_jax.families.magma.image_features import features_are_fixed
from magma_jax.models.magma import MagmaConfig
from magma_jax.nn.modules import AdapterParam, EncoderParam, HeadParam, LanguageParam, PrefixParam
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import Program
from magma_jax.training.step.optim import Group


def roles(model: MagmaConfig) -> dict[str, Literal["frozen"] | Group]:
    """Roles of the model's parameters and their groups in the paper's pretraining (appendix A)."""
    groups: dict[str, Literal["frozen"] | Group] = {
        LanguageParam.role: "frozen",
        PrefixParam.role: Group(),
        EncoderParam.role: Group(learning_rate=2e-6),
    }
    if model.mlp_adapter or model.attn_adapter or model.lora:
        groups[AdapterParam.role] = Group()
    if model.classes:
        groups[HeadParam.role] = Group()
    return groups


def base_may_differ(base: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields in which a base may differ: how the model is run, stored and initialised, and an added class head."""
    names = ("dtype", "lm.dtype", "lm.embedding_std", "prefix.dropout", "mlp_adapter.init", "attn_adapter.init")
    names = (*names, "lora.dropout") if base.get("lora") else names
    return names if base.get("classes") else (*names, "classes")


def complete(config: RunConfig) -> RunConfig:
    """The config with unset data settings filled in from the model.

    Raises:
        ValueError: the data settings do not fit the model.
    """
    data, model = config.data, config.model
    if data.pack > 1 and config.loss.batch_norm == "batch":
        raise ValueError("rows with data.pack have empty places for images, which loss.batch_norm=batch would count")
    if not isinstance(data, FoldersConfig):
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
    """Shapes and dtypes of a run's longest batch, as ``data.batches`` and ``families.magma.image_features`` make it."""
    config, encoder = program.config, program.config.model.encoder
    rows, length = config.batch_size, config.data.length
    shapes: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(("tokens", "labels"), ((rows, length), jnp.int32))
    images: tuple[int, ...] = (rows,)
    if config.data.pack > 1:
        shapes |= dict.fromkeys(("segments", "positions"), ((rows, length), jnp.int32))
        images = (rows, config.data.pack)
    if features_are_fixed(program) and not isinstance(config.data, FoldersConfig):
        grid = (encoder.channels,) if encoder.positions is None else (encoder.positions, encoder.channels)
        shapes["features"] = ((*images, *grid), jnp.float32)
    else:
        shapes["images"] = ((*images, encoder.image_size, encoder.image_size, 3), jnp.uint8)
    return shapes

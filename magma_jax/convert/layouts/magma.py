"""MAGMA's published layout."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from magma_jax.convert.golden_generate import generations
from magma_jax.convert.golden_run import Subject, cast, forward, half_precision, training
from magma_jax.convert.layouts.layout import Layout
from magma_jax.convert.magma_checkpoint import from_torch, published_module, to_torch
from magma_jax.convert.open_folder import open_model_folder
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.families.magma.generator import Magma

INPUTS = {"images", "captions", "text_a", "text_b", "opt/images_1", "opt/captions_1", "geneos/eos_token"}
INPUTS |= {"grad_names", "opt/param_names"}


def _from_torch(
    checkpoint: str | Path, out: str | Path, model_config: Mapping[str, Any] | None, tokenizer: Tokenizer | None
) -> str:
    config = from_torch(checkpoint, out, model_config, tokenizer)
    lm = config.lm
    return f"{lm.layers} layers of width {lm.width}, {config.encoder.kind}, vocabulary {lm.vocab_rows}"


def _quantities(
    checkpoint: Path, arrays: Mapping[str, np.ndarray], model_config: Mapping[str, Any] | None
) -> Iterator[tuple[str, Any]]:
    """All quantities; ``model_config`` may also hold ``eos_token``, ``image_token`` and ``opt_groups`` of the run."""
    loaded = Magma.from_checkpoint(checkpoint, model_config=model_config)
    config = dataclasses.replace(loaded.config, dtype="float32")
    subject = Subject(config, cast(loaded.params, jnp.float32), arrays, model_config or {})
    for part in (forward, half_precision, training, generations):
        yield from part(subject)


MAGMA = Layout(
    from_torch=_from_torch,
    to_torch=to_torch,
    params=lambda folder: open_model_folder(folder).params,
    published=lambda folder: published_module(open_model_folder(folder)),
    golden_inputs=frozenset(INPUTS),
    quantities=_quantities,
)

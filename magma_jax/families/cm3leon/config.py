"""Parts of a run that follow from a CM3Leon model: groups of parameters, data settings, batch shapes, operations."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from magma_jax.data.documents.beside import BesideConfig
from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig
from magma_jax.family import ShardingRow
from magma_jax.models.cm3leon import CM3LeonConfig
from magma_jax.models.vision.vqgan import SHARDINGS as TOKENIZER_SHARDINGS
from magma_jax.models.vision.vqgan import TOKENIZER
from magma_jax.nn.modules import LanguageParam, TokenizerParam
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import Program
from magma_jax.training.step.flops import LANGUAGE_INPUTS, StepFlops, attention_flops, matrix_flops
from magma_jax.training.step.optim import Group
from magma_jax.typing import IGNORED

# The decoder has the shared rows; one row matches each parameter.
SHARDINGS: tuple[ShardingRow, ...] = TOKENIZER_SHARDINGS

# Batches hold codes, so the step does not run the tokenizer.
INPUTS = (
    (re.compile(rf"{TOKENIZER}/.*"), None),
    (re.compile(r"grid/weight|references/(order|words)/weight"), None),
    (re.compile(r"references/token/weight"), "words"),
    (re.compile(r"references/(caption|agreement)/.*weight"), "captions"),
    (re.compile(r"references/.*weight"), "positions"),
    *LANGUAGE_INPUTS,
)


def roles(model: CM3LeonConfig) -> dict[str, Literal["frozen"] | Group]:
    """Roles of the parameters: the decoder learns, its image tokenizer does not."""
    groups: dict[str, Literal["frozen"] | Group] = {LanguageParam.role: Group()}
    if model.tokenizer is not None:
        groups[TokenizerParam.role] = "frozen"
    return groups


def complete(config: RunConfig) -> RunConfig:
    """The config with the vocabulary and image sizes of its model.

    Raises:
        ValueError: data and model do not fit.
    """
    model, data = config.model, config.data
    if config.optim.groups.get(TokenizerParam.role, "frozen") != "frozen":
        raise ValueError(
            "optim.groups.tokenizer: batches hold codes, so the image tokenizer cannot learn here; set it to frozen, "
            "and train the tokenizer alone"
        )
    if model.tokenizer is not None and not (config.base or TOKENIZER in config.weights):
        raise ValueError(
            "weights.image_tokenizer: the model's image tokenizer is frozen, so it needs trained weights; name a "
            "run or model folder of a VQ-GAN, or a file of one"
        )
    if data.length > model.context_length:
        raise ValueError(
            f"data.length {data.length} exceeds model.context_length {model.context_length}; lower it or raise that"
        )
    for name, mine in (("vocabulary", model.vocabulary), ("image_tokens", model.image_tokens)):
        given = getattr(data, name)
        if given is not None and given != mine:
            raise ValueError(f"data.{name} is {given}, but the model's is {mine}; leave data.{name} out")
    beside = getattr(data, "beside", BesideConfig())
    wanted = model.references
    if beside.images != (0 if wanted is None else wanted.images):
        raise ValueError(
            f"data.beside.images is {beside.images}, but model.references "
            + ("is None; set both or neither" if wanted is None else f"has {wanted.images} images; make them equal")
        )
    if config.loss.ranges and wanted is None:
        raise ValueError("loss.ranges needs rows of one document, as data.beside makes them; set it to False")
    changes: dict[str, Any] = {"vocabulary": model.vocabulary, "image_tokens": model.image_tokens}
    if wanted is not None:
        changes["beside"] = dataclasses.replace(beside, caption_words=wanted.caption_words, word_rows=wanted.word_rows)
    if isinstance(data, OpenmojiDocumentsConfig):
        if model.tokenizer is None:
            raise ValueError("data.kind openmoji_documents has images, not codes: set model.tokenizer")
        changes["image_size"] = model.tokenizer.image_size
    elif data.tokenizer is None:
        changes["tokenizer"] = config.base or "gpt2"
    return dataclasses.replace(config, data=dataclasses.replace(data, **changes))


def batch_shapes(program: Program) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of a batch: blocks of the length that the model reads, and one more token, the last label."""
    rows = (program.config.batch_size, program.config.data.length + 1)
    found: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(("tokens", "labels"), (rows, jnp.int32))
    references = program.config.model.references
    if references is not None or program.config.model.grid_positions:
        found["places"] = found["tokens"]
    if references is not None:
        batch, images = program.config.batch_size, references.images
        found["references"] = ((batch, images, program.config.model.image_tokens), jnp.int32)
        found["captions"] = ((batch, images + 1, references.caption_words), jnp.int32)
    return found


def count(batch: Mapping[str, np.ndarray], pad_id: int) -> tuple[int, int]:
    """Blocks, and tokens without padding. ``pad_id`` belongs to the text tokenizer, which has no padding here."""
    return len(batch["tokens"]), int((batch["labels"] != IGNORED).sum())


def flops(config: CM3LeonConfig, shapes: Any, labels: Any, batch: Any) -> StepFlops:
    """Operations of a step, see ``training.step.flops``."""
    rows, length = batch["tokens"]
    vectors = {"positions": length - 1, "predicted": length - 1}  # the last token is only a label
    if config.references is not None:
        _, captions, words = batch["captions"]
        vectors |= {"words": captions * words, "captions": 1}
    frozen, trained = matrix_flops(shapes, labels, INPUTS, vectors)
    return StepFlops(rows * frozen, rows * trained, rows * attention_flops(config.width, config.layers, length - 1), 0)

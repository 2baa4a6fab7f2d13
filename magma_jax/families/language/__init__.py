"""Language models alone: next-token prediction of text."""

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from magma_jax.data.openmoji.dataset import OpenmojiConfig, OpenmojiTextConfig
from magma_jax.families.language.loss import language_loss
from magma_jax.family import Family
from magma_jax.inference.decoding.program import decode_program
from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.modules import LanguageParam
from magma_jax.storage.model_folder import CheckpointError
from magma_jax.training.monitor.throughput import count_batch
from magma_jax.training.step.flops import LANGUAGE_INPUTS, StepFlops, attention_flops, matrix_flops
from magma_jax.training.step.optim import Group
from magma_jax.training.step.options import LossOptions


def _build(config: LanguageModelConfig, rngs: nnx.Rngs) -> Decoder:
    return Decoder(config, rngs=rngs)


def _batch_shapes(program: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    rows, data = (program.config.batch_size, program.config.data.length), program.config.data
    names = ("tokens", "labels", *(("segments", "positions") if data.pack > 1 else ()))
    return dict.fromkeys(names, (rows, jnp.int32))


def _flops(config: LanguageModelConfig, shapes: Any, labels: Any, batch: Any, options: Any = None) -> StepFlops:
    rows, length = batch["tokens"]
    # The last token predicts nothing and is not run.
    vectors = {"positions": length - 1, "predicted": length - 1}
    frozen, trained = matrix_flops(shapes, labels, LANGUAGE_INPUTS, vectors)
    attention = attention_flops(config.trunk().block.query_width, config.layers, length - 1)
    return StepFlops(rows * frozen, rows * trained, rows * attention, 0)


def _open(path: str | Path, **_: Any) -> Any:
    raise CheckpointError(
        f"{path}: a plain language model, which cannot be prompted or served; give the folder of a model with images, "
        "such as a run of configs/quickstart.py"
    )


LANGUAGE = Family(
    name="language",
    configs=LanguageModelConfig.__args__,
    data=(OpenmojiConfig, OpenmojiTextConfig),
    options=LossOptions,
    recognises=lambda keys: False,
    build=_build,
    roles=lambda config: {LanguageParam.role: Group()},
    complete=lambda config: config,
    loss=language_loss,
    shardings=(),
    vocab_rows=lambda config: config.vocab_rows,
    batch_shapes=_batch_shapes,
    count=count_batch,
    flops=_flops,
    prepare=lambda program, dataset, params: lambda batch: batch,
    first_values=lambda program, dataset, params: {},
    fresh=r"",
    base_may_differ=lambda model: ("dtype", "embedding_std"),
    parts={},
    open=_open,
    decode_program=functools.partial(decode_program, lambda model: model),
    panel=None,
)

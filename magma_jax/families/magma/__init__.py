"""MAGMA: images become words of a frozen language model (Eichenberg et al., 2021)."""

import functools
from typing import Any

import numpy as np
from flax import nnx

from magma_jax.data.folder_dataset import FoldersConfig
from magma_jax.data.openmoji.dataset import OpenmojiConfig
from magma_jax.families.magma.config import base_may_differ, batch_shapes, complete, roles
from magma_jax.families.magma.flops import step_flops
from magma_jax.families.magma.generator import Magma
from magma_jax.families.magma.image_features import feature_statistics, image_loader
from magma_jax.families.magma.loss import caption_loss
from magma_jax.families.magma.panel import Sampler
from magma_jax.families.magma.word_start import word_start
from magma_jax.family import Family
from magma_jax.inference.decoding.program import decode_program
from magma_jax.models.magma import SHARDINGS, MagmaConfig, MagmaModel
from magma_jax.published.encoder_sources import open_encoder
from magma_jax.published.language_model_sources import open_lm
from magma_jax.published.magma_keys import is_magma
from magma_jax.training.monitor.throughput import count_batch
from magma_jax.training.step.options import LossOptions


def _build(config: MagmaConfig, rngs: nnx.Rngs) -> MagmaModel:
    return MagmaModel(config, rngs=rngs)


def _first_values(program: Any, dataset: Any, params: Any) -> dict[str, Any]:
    if program.config.model.prefix.start == "words":
        return word_start(program.config.model, dataset, program.graphdef, params)
    if dataset.images is None:
        return {}
    learned = dataset.images if dataset.learned is None else dataset.images[np.asarray(dataset.learned)]
    return feature_statistics(learned, program.graphdef, params)


MAGMA = Family(
    name="magma",
    configs=(MagmaConfig,),
    data=(OpenmojiConfig, FoldersConfig),
    options=LossOptions,
    recognises=is_magma,
    build=_build,
    roles=roles,
    complete=complete,
    loss=caption_loss,
    shardings=SHARDINGS,
    vocab_rows=lambda config: config.lm.vocab_rows,
    begin=lambda config: config.begin,
    batch_shapes=batch_shapes,
    count=count_batch,
    flops=step_flops,
    prepare=lambda program, dataset, params: image_loader(dataset.images, program, params),
    first_values=_first_values,
    fresh=r"lm/.*(_adapter|/lora)/.*",
    base_may_differ=base_may_differ,
    parts={
        "lm": lambda path, model: open_lm(path, model.lm),
        "image_prefix/encoder": lambda path, model: open_encoder(path, model.encoder),
    },
    open=Magma.from_checkpoint,
    decode_program=functools.partial(decode_program, lambda model: model.lm),
    panel=Sampler,
)

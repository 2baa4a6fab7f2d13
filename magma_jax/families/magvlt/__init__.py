"""MAGVLT: images from text, text from images, and both filled in where they are masked (Kim et al., 2023)."""

from typing import Any

from flax import nnx

from magma_jax.data.code_pairs import CodePairsConfig
from magma_jax.data.openmoji.pairs import OpenmojiPairsConfig
from magma_jax.families.magvlt.config import base_may_differ, batch_shapes, complete, count, step_flops
from magma_jax.families.magvlt.decoding.plan import drawing_step
from magma_jax.families.magvlt.evaluating.run import evaluate_run
from magma_jax.families.magvlt.generator import Magvlt
from magma_jax.families.magvlt.loss import magvlt_loss
from magma_jax.families.magvlt.options import MagvltOptions
from magma_jax.families.magvlt.panel import Panel
from magma_jax.families.magvlt.prepare import make_prepare
from magma_jax.families.magvlt.sharding import SHARDINGS, roles
from magma_jax.families.vqgan.loading import open_image_tokenizer
from magma_jax.family import Family
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.models.vision.vqgan import TOKENIZER
from magma_jax.published.open_magvlt import is_magvlt


def _build(config: MagvltConfig, rngs: nnx.Rngs) -> MagvltModel:
    return MagvltModel(config, rngs=rngs)


def _open_tokenizer(path: Any, config: MagvltConfig) -> Any:
    assert config.tokenizer is not None  # a config without one has no such parameters
    return open_image_tokenizer(path, config.tokenizer)


MAGVLT = Family(
    name="magvlt",
    configs=(MagvltConfig,),
    data=(CodePairsConfig, OpenmojiPairsConfig),
    options=MagvltOptions,
    recognises=is_magvlt,
    build=_build,
    roles=roles,
    complete=complete,
    loss=magvlt_loss,
    shardings=SHARDINGS,
    vocab_rows=lambda config: config.text_rows,
    batch_shapes=batch_shapes,
    count=count,
    flops=step_flops,
    prepare=make_prepare,
    first_values=lambda program, dataset, params: {},
    fresh=r"class_head/.*",
    base_may_differ=base_may_differ,
    parts={TOKENIZER: _open_tokenizer},
    open=Magvlt.from_checkpoint,
    decode_program=drawing_step,
    panel=Panel,
    decodes="steps of an image",
    token_generator=False,
    evaluate=evaluate_run,
)

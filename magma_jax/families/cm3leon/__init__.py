"""CM3Leon: a decoder over text and image tokens that retrieves, draws, edits and answers (Yu et al. 2023)."""

import functools

from flax import nnx

from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig
from magma_jax.families.cm3leon.config import SHARDINGS, batch_shapes, complete, count, flops, roles
from magma_jax.families.cm3leon.generator import CM3LeonGenerator
from magma_jax.families.cm3leon.image_codes import code_loader
from magma_jax.families.cm3leon.loss import CM3LeonOptions, cm3leon_loss
from magma_jax.family import Family
from magma_jax.inference.decoding.program import decode_program
from magma_jax.models.cm3leon import CM3Leon, CM3LeonConfig


def _build(config: CM3LeonConfig, rngs: nnx.Rngs) -> CM3Leon:
    return CM3Leon(config, rngs=rngs)


CM3LEON = Family(
    name="cm3leon",
    configs=(CM3LeonConfig,),
    data=(OpenmojiDocumentsConfig,),
    options=CM3LeonOptions,
    build=_build,
    roles=roles,
    complete=complete,
    loss=cm3leon_loss,
    shardings=SHARDINGS,
    vocab_rows=lambda config: config.vocabulary.text,
    batch_shapes=batch_shapes,
    count=count,
    flops=flops,
    prepare=code_loader,
    first_values=lambda program, dataset, params: {},
    fresh=r"",
    base_may_differ=lambda model: ("dtype", "embedding_std", "position_std"),
    parts={},
    open=CM3LeonGenerator.from_checkpoint,
    decode_program=functools.partial(decode_program, lambda model: model),
    panel=None,
)

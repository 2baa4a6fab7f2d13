"""CM3Leon: a decoder over text and image tokens that retrieves, draws, edits and answers (Yu et al. 2023)."""

import functools
from typing import Any

from flax import nnx

from magma_jax.data.documents.folders import DocumentFoldersConfig
from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig
from magma_jax.data.documents.openmoji_edits import OpenmojiEditsConfig
from magma_jax.families.cm3leon.config import SHARDINGS, batch_shapes, complete, count, flops, roles
from magma_jax.families.cm3leon.evaluating.run import evaluate_run
from magma_jax.families.cm3leon.generator import CM3Leon
from magma_jax.families.cm3leon.image_codes import code_loader
from magma_jax.families.cm3leon.loss import CM3LeonOptions, cm3leon_loss
from magma_jax.families.vqgan.loading import open_image_tokenizer
from magma_jax.family import Family
from magma_jax.inference.decoding.program import decode_program
from magma_jax.models.cm3leon import CM3LeonConfig, CM3LeonModel
from magma_jax.models.vision.vqgan import TOKENIZER
from magma_jax.published.cm3leon_keys import is_cm3leon


def _build(config: CM3LeonConfig, rngs: nnx.Rngs) -> CM3LeonModel:
    return CM3LeonModel(config, rngs=rngs)


def _open_tokenizer(path: Any, config: CM3LeonConfig) -> Any:
    assert config.tokenizer is not None  # a config without one has no such parameters
    return open_image_tokenizer(path, config.tokenizer)


CM3LEON = Family(
    name="cm3leon",
    configs=(CM3LeonConfig,),
    data=(OpenmojiDocumentsConfig, OpenmojiEditsConfig, DocumentFoldersConfig),
    options=CM3LeonOptions,
    recognises=is_cm3leon,
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
    parts={TOKENIZER: _open_tokenizer},
    open=CM3Leon.from_checkpoint,
    decode_program=functools.partial(decode_program, lambda model: model),
    panel=None,
    token_generator=False,
    evaluate=evaluate_run,
)

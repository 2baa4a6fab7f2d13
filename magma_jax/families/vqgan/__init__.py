"""VQ-GAN (Esser et al., 2021): the image tokenizer of models that read and write images as codes."""

import sys

from magma_jax.data.folder_dataset import FoldersConfig
from magma_jax.data.openmoji.dataset import OpenmojiConfig
from magma_jax.families.vqgan.config import base_may_differ, batch_shapes, complete, step_flops
from magma_jax.families.vqgan.generator import ImageTokenizer
from magma_jax.families.vqgan.loss import VQGANOptions, vqgan_loss
from magma_jax.families.vqgan.model import SHARDINGS, VQGANModelConfig, build, roles
from magma_jax.families.vqgan.panel import Panel
from magma_jax.families.vqgan.start import first_codebook, image_batch
from magma_jax.family import Family
from magma_jax.published.vqgan_keys import is_vqgan

VQGAN = Family(
    name="vqgan",
    configs=(VQGANModelConfig,),
    data=(OpenmojiConfig, FoldersConfig),
    options=VQGANOptions,
    recognises=is_vqgan,
    build=build,
    roles=roles,
    complete=complete,
    loss=vqgan_loss,
    shardings=SHARDINGS,
    vocab_rows=lambda config: sys.maxsize,  # texts beside the images are not used
    batch_shapes=batch_shapes,
    count=lambda batch, pad_id: (len(batch["images"]), 0),
    flops=step_flops,
    prepare=lambda program, dataset, params: image_batch(dataset),
    first_values=first_codebook,
    fresh=r"",
    base_may_differ=base_may_differ,
    parts={},
    open=ImageTokenizer.from_checkpoint,
    decode_program=None,
    panel=Panel,
)

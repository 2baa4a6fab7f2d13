"""VQ-GANs in taming-transformers' layout, alone or with the prefix that they have inside MAGVLT."""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from magma_jax.convert.golden import inputs_of
from magma_jax.convert.layouts.layout import (
    Layout,
    absent_folder,
    in_order,
    read_source,
    write_checkpoint,
    write_folder,
)
from magma_jax.convert.magma_checkpoint import absent
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.families.vqgan.loading import load_image_tokenizer, open_folder
from magma_jax.families.vqgan.model import VQGANModelConfig
from magma_jax.models.vision.quantizer import nearest_codes
from magma_jax.models.vision.vqgan import VQGAN as VQGANModule
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.vqgan_keys import open_torch_vqgan, vqgan_table
from magma_jax.storage.model_folder import CheckpointError


def from_torch(
    checkpoint: str | Path,
    out: str | Path,
    model_config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> str:
    """Converts a file to a model folder, in the file's dtypes, see ``open_torch_vqgan``.

    Raises:
        ValueError: a tokenizer of texts is given. CheckpointError: ``out`` already exists, or the disk is too small.
        Also the errors of ``open_torch_vqgan``.
    """
    absent_folder(out)
    if tokenizer is not None:
        raise ValueError("--tokenizer: a VQ-GAN reads no texts; leave it out")
    with open_torch_vqgan(checkpoint, model_config) as model:
        config = VQGANModelConfig(**vars(model.config))
        if model.dropped:
            print(f"{checkpoint}: dropped, used by the original's training only: loss.*", file=sys.stderr)
        write_folder(checkpoint, out, config, model.params, model.files, model.source)
    side = config.image_size // config.factor
    return f"{config.codes} codes of width {config.code_width}, {side} x {side} of them for {config.image_size} pixels"


def published(folder: str | Path) -> dict[str, Any]:
    """A folder's tensors under taming's keys, with the source's prefix and in its order.

    Raises:
        CheckpointError: not such a folder, or a model with patches.
    """
    source, (config, params) = read_source(folder), open_folder(folder)
    if config.patch > 1:
        raise CheckpointError(
            f"{folder}: the published layout has no patches, but the model's are of {config.patch} pixels"
        )
    return in_order(to_theirs(vqgan_table(source.get("prefix", "")), params), source["keys"])


def to_torch(folder: str | Path, checkpoint: str | Path) -> None:
    """Writes a model folder or a run as a PyTorch file.

    Raises:
        FileExistsError: ``checkpoint`` already exists. CheckpointError: not such a folder.
    """
    absent(checkpoint)
    write_checkpoint(checkpoint, published(folder), read_source(folder)["counters"])


def quantities(
    checkpoint: Path, arrays: Mapping[str, np.ndarray], model_config: Mapping[str, Any] | None
) -> Iterator[tuple[str, Any]]:
    """For images ``xI``: ``encI``, ``zI``, ``quantI``, ``reconI``, ``idsI``; for ``rand_idsI``: ``decode_codeI``."""
    config, params = load_image_tokenizer(checkpoint, model_config=model_config)
    definition = abstract(lambda: VQGANModule(config, rngs=nnx.Rngs(0)))[0]

    @jax.jit
    def forward(params: Any, images: Any) -> dict[str, Any]:
        model = merge(definition, params)
        encoded = model.encoder(images)
        latents = model.quant_conv(encoded)
        codes = nearest_codes(latents, model.codebook.weight[...])
        quantized = model.codebook(codes, latents.dtype)
        images = {"enc": encoded, "z": latents, "quant": quantized, "recon": model.decode_latents(quantized)}
        return {name: _nchw(array) for name, array in images.items()} | {"ids": codes}

    decode = jax.jit(lambda params, codes: _nchw(merge(definition, params).decode(codes)))
    for name in arrays:
        if match := re.fullmatch(r"x(\d+)", name):
            images = inputs_of(arrays, name, (None, 3, None, None), "f").astype(np.float32)
            for quantity, value in forward(params, jnp.asarray(images.transpose(0, 2, 3, 1))).items():
                yield f"{quantity}{match[1]}", value
        if match := re.fullmatch(r"rand_ids(\d+)", name):
            codes = inputs_of(arrays, name, (None, None, None), "iu").astype(np.int32)
            yield f"decode_code{match[1]}", decode(params, jnp.asarray(codes))


def _nchw(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2)


VQGAN = Layout(
    from_torch=from_torch,
    to_torch=to_torch,
    params=lambda folder: open_folder(folder)[1],
    published=published,
    golden_inputs=frozenset({"min_gap", *(f"{name}{i}" for name in ("x", "rand_ids") for i in range(10))}),
    quantities=quantities,
)

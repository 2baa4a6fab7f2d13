"""A MAGMA model and a dataset small enough for tests."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from magma_jax.data.batches.held_out import held_out_batches
from magma_jax.data.batches.pipeline import encode_sample, sample_batches, text_padding
from magma_jax.data.dataset import Dataset
from magma_jax.data.format.records import Sample
from magma_jax.data.openmoji.dataset import OpenmojiConfig
from magma_jax.data.tokenizers.byte_level import Tokenizer, train_bpe
from magma_jax.data.tokenizers.settings import TokenizerSettings
from magma_jax.families import family_of
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.magma import MagmaConfig
from magma_jax.models.prefix import PrefixConfig
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.runtime.sharding import MeshConfig
from magma_jax.training import loop
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.setup import Run
from magma_jax.training.step.optim import Group, OptimConfig
from magma_jax.training.step.options import LossOptions

# Compiles slowly on a CPU, so only tests of BatchNorm use it.
RESNET = CLIPResNetConfig(blocks=(1, 2, 1, 1), width=8, image_size=64)

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}

MODEL = MagmaConfig(
    lm=GPTJConfig(
        layers=2, width=32, heads=2, rotary_dim=8, feed_forward=64, vocab_rows=300, head_rows=310, context_length=64
    ),
    encoder=CLIPViTConfig(layers=1, width=32, heads=2, patch=32, image_size=64, embedding_width=16, output="grid"),
    prefix=PrefixConfig(dropout=0.1),
    mlp_adapter=AdapterConfig(downsample_factor=4),
    attn_adapter=AdapterConfig(downsample_factor=4),
)


def dataset() -> Dataset:
    """Plain coloured squares with a caption and a question each."""
    samples, images = [], []
    for row, (name, colour) in enumerate(COLOURS.items()):
        images.append(np.broadcast_to(np.array(colour, np.uint8), (64, 64, 3)))
        samples.append(Sample(row, "A picture of", f" a {name} square", "caption"))
        samples.append(Sample(row, "Q: What colour is it? A:", f" {name}", "colour"))
    tokenizer = train_bpe([sample.prompt + sample.answer for sample in samples], 299)

    def batches(batch_size, seed, rows):
        return sample_batches([samples], [1.0], tokenizer, batch_size=batch_size, length=40, seed=seed, rows=rows)

    evaluation = {"train": samples, "test": samples}
    encode = functools.partial(encode_sample, tokenizer=tokenizer, length=32)
    return Dataset(
        tokenizer=tokenizer,
        batches=batches,
        images=np.stack(images),
        evaluation=evaluation,
        validation_batches=held_out_batches(evaluation, encode, 32, text_padding(tokenizer)),
    )


def with_ends(tokenizer: Tokenizer, *ends: int) -> Tokenizer:
    """The tokenizer, with further ends of text."""
    return Tokenizer.from_json(tokenizer.to_json(), settings=TokenizerSettings(ends=ends))


def run_config(**changes) -> RunConfig:
    """Four steps of a run in which adapters, prefix and encoder learn."""
    config = RunConfig(
        model=MODEL,
        data=OpenmojiConfig(),
        optim=OptimConfig(learning_rate=1e-2, clip_norm=1.0, groups={"encoder": Group(learning_rate=1e-3)}),
        loss=LossOptions(),
        steps=4,
        batch_size=4,
        log_every=1,
        checkpoint_every=1,
    )
    return dataclasses.replace(config, **changes)


def train(config: RunConfig, workdir: str | Path) -> Run:
    """Trains on one device: eight take longer to compile."""
    return loop.train(family_of(config.model), config, workdir, jax.devices()[:1])


def mesh_config(mesh: MeshConfig, steps: int) -> RunConfig:
    """A run with much dropout and a batch for up to eight devices; its schedule does not depend on ``steps``."""
    model = dataclasses.replace(MODEL, prefix=PrefixConfig(dropout=0.5))
    config = run_config(model=model, mesh=mesh, steps=steps, batch_size=8)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=8))

"""A small MAGVLT, a tokenizer with a codebook of its images' own vectors, and pairs of images and texts."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from magma_jax.config import to_dict
from magma_jax.data.batches.pairs import held_out_pairs, pair_batches
from magma_jax.data.dataset import Dataset
from magma_jax.data.format.records import Sample
from magma_jax.data.openmoji.pairs import OpenmojiPairsConfig
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.data.tokenizers.text import encode_padded
from magma_jax.families.magvlt.options import MagvltOptions
from magma_jax.families.vqgan.model import VQGANModelConfig
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.vision.vqgan import VQGAN, VQGANConfig, from_pixels
from magma_jax.nn.modules import split
from magma_jax.storage.model_folder import write_model_folder
from magma_jax.training.monitor.writers import WatchConfig
from magma_jax.training.run.config import RunConfig
from magma_jax.training.step.optim import OptimConfig

SIZES = {"image_size": 16, "width": 32, "multipliers": (1, 1, 1), "blocks": 1, "attention_sizes": ()}
SIZES |= {"latent_channels": 8, "code_width": 8, "codes": 32}
TOKENIZER = VQGANConfig(**SIZES)
MODEL = MagvltConfig(
    layers=2,
    width=64,
    heads=2,
    image_rows=32,
    text_rows=300,
    image_positions=16,
    text_positions=10,
    attention_dropout=0.0,
    residual_dropout=0.0,
    tokenizer=TOKENIZER,
)
# Without the helper losses, which take two of three passes; tests/families/test_magvlt_loss.py has them.
LOSS = MagvltOptions(
    label_smoothing=0.0, length_weight=1.0, task_weights=(2.0, 1.0, 1.0), unroll_weight=0.0, mixsel_weight=0.0
)
NAMES = ("a dark cat", "a red flag of France", "dog", "a woman with red hair")


def images():
    """One image per name: quarters of different colours."""
    rng = np.random.default_rng(3)
    quarters = rng.integers(0, 256, (len(NAMES), 2, 2, 3), np.uint8)
    return quarters.repeat(8, 1).repeat(8, 2)


@functools.cache
def tokenizer_params():
    """Fresh weights, with a codebook of the vectors of ``images``."""
    model = VQGAN(TOKENIZER, rngs=nnx.Rngs(0))
    vectors = np.asarray(model.latents(from_pixels(jnp.asarray(images())))).reshape(-1, 8)
    rows = np.random.default_rng(0).permutation(len(vectors))[:32]
    return split(model)[1] | {"codebook/weight": jnp.asarray(vectors[rows])}


def write_tokenizer(folder):
    """The tokenizer as a model folder."""
    write_model_folder(folder, {"model": to_dict(VQGANModelConfig(**SIZES))}, tokenizer_params())
    return folder


def dataset():
    """The pairs, every one in each split."""
    tokenizer = train_bpe(list(NAMES), 300)

    def encode(sample, rng):
        text = encode_padded(tokenizer, sample.answer.strip(), MODEL.text_positions, too_long="error")
        return {
            "tokens": np.array(text.ids, np.int32),
            "lengths": np.int32(text.length),
            "image_rows": np.int32(sample.image),
        }

    samples = [Sample(row, "A picture of", f" {name}", "caption") for row, name in enumerate(NAMES)]
    evaluation = {"train": samples, "test": samples}
    return Dataset(
        tokenizer=tokenizer,
        batches=lambda size, seed, of: pair_batches([samples], [1.0], encode, batch_size=size, seed=seed, rows=of),
        images=images(),
        evaluation=evaluation,
        validation_batches=held_out_pairs(evaluation, encode),
    )


def run_config(tokenizer, **changes):
    """A run that learns the pairs by heart."""
    values = {
        "model": MODEL,
        "data": OpenmojiPairsConfig(tokenizer="quickstart"),
        "optim": OptimConfig(learning_rate=3e-3, schedule="constant"),
        "loss": LOSS,
        "weights": {"image_tokenizer": str(tokenizer)},
        "steps": 4,
        "batch_size": 8,
        "log_every": 1,
        "checkpoint_every": 147,
        "watch": WatchConfig(tensorboard=False),
    }
    return RunConfig(**(values | changes))

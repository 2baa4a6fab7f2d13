"""CM3Leon as a family: it trains, resumes, is sharded, planned and opened again, and draws what it has learned."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from magma_jax.data.dataset import Dataset
from magma_jax.data.documents.document import Image as ImagePart
from magma_jax.data.documents.document import RetrievedDocuments, Text
from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig
from magma_jax.data.documents.settings import block_batches, held_out_documents
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.families import open_generator
from magma_jax.families.cm3leon import CM3LEON
from magma_jax.models.cm3leon import CM3LeonConfig
from magma_jax.models.vision.vqgan import VQGAN, VQGANConfig
from magma_jax.nn.modules import split
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.loop import train
from magma_jax.training.monitor.writers import WatchConfig
from magma_jax.training.run import setup
from magma_jax.training.run.config import RunConfig
from magma_jax.training.step.optim import OptimConfig

ONE = jax.devices()[:1]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}
SIDE, GRID = 8, 16
TOKENIZER = VQGANConfig(
    image_size=SIDE,
    width=32,
    multipliers=(1, 1),
    blocks=1,
    attention_sizes=(),
    latent_channels=8,
    code_width=8,
    codes=64,
)
TEXTS = [f"{kind} {colour}" for colour in COLOURS for kind in ("plain", "half")]
BPE = train_bpe([f"a {text} square" for text in TEXTS] * 4, 280)
LAYOUT = VocabLayout(text=BPE.vocab_size, image=64, sentinels=8)
MODEL = CM3LeonConfig(
    layers=2,
    width=64,
    heads=4,
    feed_forward=128,
    vocab_rows=LAYOUT.rows,
    vocabulary=LAYOUT,
    context_length=96,
    embedding_std=0.05,
    image_tokens=GRID,
    tokenizer=TOKENIZER,
)


def drawings():
    images = np.zeros((len(TEXTS), SIDE, SIDE, 3), np.uint8)
    for row, text in enumerate(TEXTS):
        kind, colour = text.split()
        images[row] = COLOURS[colour]
        if kind == "half":
            images[row, :, SIDE // 2 :] = 0
    return images


def dataset(config):
    layout, image_tokens = config.layout()
    images = drawings()
    pairs = [
        (
            Text(np.array(BPE.encode(f"a {text} square"))),
            ImagePart(np.arange(row * image_tokens, (row + 1) * image_tokens)),
        )
        for row, text in enumerate(TEXTS)
    ]
    documents = RetrievedDocuments(
        queries=pairs * 32,  # Grain shuffles few numbers slowly
        layout=dataclasses.replace(layout, image=len(images) * image_tokens),
        image_tokens=image_tokens,
        retrieved=0,
    )
    return Dataset(
        tokenizer=BPE,
        batches=block_batches(documents, config),
        images=images,
        validation_batches=held_out_documents({"train": documents, "test": documents}, config.length),
    )


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    monkeypatch.setattr(setup, "load_dataset", dataset)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """An image tokenizer; a random one has codes that tell the drawings apart."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    params = jax.jit(lambda: split(VQGAN(TOKENIZER, rngs=nnx.Rngs(0)))[1])()
    save_file({name: np.asarray(leaf) for name, leaf in params.items()}, path)
    return str(path)


@pytest.fixture
def config(tokenizer_file):
    return run_config(tokenizer_file)


def run_config(tokenizer_file, **changes):
    config = RunConfig(
        model=MODEL,
        weights={"image_tokenizer": tokenizer_file},
        data=OpenmojiDocumentsConfig(length=64),
        optim=OptimConfig(learning_rate=4e-3, clip_norm=1.0, steps=150),
        steps=150,
        batch_size=8,
        log_every=1,
        checkpoint_every=150,
        validation=ValidationConfig(every=75, split="test", samples=8),
        watch=WatchConfig(tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(tokenizer_file, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_dataset", dataset)
        return train(CM3LEON, run_config(tokenizer_file), tmp_path_factory.mktemp("cm3leon") / "run", ONE)


@pytest.fixture(scope="module")
def model(finished):
    return open_generator(finished.workdir)


@pytest.fixture(scope="module")
def codes(model):
    """The codes of all drawings."""
    return model.images.encode(drawings())


def lines(run):
    return [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]


def test_image_and_text_loss_fall(finished):
    trained = [line for line in lines(finished) if "loss" in line]
    assert len(trained) == 150
    for name in ("loss", "image_loss", "text_loss"):
        assert trained[-1][name] < 0.5 * trained[0][name]
    assert trained[-1]["image_loss"] < 0.5
    assert trained[-1]["skipped_samples"] == 0
    validated = [line for line in lines(finished) if "validation_loss" in line]
    assert [line["step"] for line in validated] == [75, 150]
    assert {"validation_image_loss", "validation_text_loss"} <= validated[0].keys()


def test_it_draws_what_it_has_learned(model, codes):
    from magma_jax.families.cm3leon.options import DrawOptions

    texts = [f"a {text} square" for text in TEXTS]
    drawn = model.draw_codes(texts, DrawOptions(temperature=(0.0, 0.0)))
    np.testing.assert_array_equal(np.concatenate(drawn), codes)

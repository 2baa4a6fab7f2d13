"""The autoregressive baseline: opened and trained as MAGVLT; cached decoding equals the full forward pass."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax.config import ConfigError, to_dict
from magma_jax.convert.layouts.magvlt import published
from magma_jax.data.images import ImageInput
from magma_jax.families import open_generator
from magma_jax.families.magvlt import MAGVLT
from magma_jax.families.magvlt.decoding.likelihood import likelihood
from magma_jax.families.magvlt.decoding.next_token import CodeRun, draw_codes, write_texts
from magma_jax.families.magvlt.decoding.text import TextRun
from magma_jax.families.magvlt.loss import magvlt_loss
from magma_jax.inference.answers import AnswerOptions, ImageOptions
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.sampling import sampling_rows
from magma_jax.models.magvlt.model import MagvltModel, canvas_of
from magma_jax.nn.modules import merge, split
from magma_jax.storage.model_folder import CheckpointError, write_model_folder
from magma_jax.training.loop import train
from magma_jax.training.run import setup
from tests.families import magvlt_tiny
from tests.families.magvlt_tiny import NAMES, run_config

ONE = jax.devices()[:1]
CAUSAL = dataclasses.replace(magvlt_tiny.MODEL, causal=True, caption_vector=True, context_head=True)
LOSS = dataclasses.replace(magvlt_tiny.LOSS, length_weight=0.0, task_weights=(1.0, 1.0, 0.0))
KEYS = jax.random.split(jax.random.key(1), 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights ten times the usual, so that logits differ."""
    path = tmp_path_factory.mktemp("argvlt") / "model"
    params = jax.jit(lambda: split(MagvltModel(CAUSAL, rngs=nnx.Rngs(0)))[1])()
    params = {name: leaf * (1 if leaf.ndim < 2 else 10) for name, leaf in params.items()}
    params |= {f"image_tokenizer/{name}": leaf for name, leaf in magvlt_tiny.tokenizer_params().items()}
    write_model_folder(path, {"model": to_dict(CAUSAL)}, params)
    magvlt_tiny.dataset().tokenizer.save(path / "tokenizer")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return open_generator(folder)


@pytest.fixture(scope="module")
def codes(model):
    return model.encode([ImageInput(Image.fromarray(image)) for image in magvlt_tiny.images()])


def full(model, order, image, text, lengths):
    """Logits of the second modality by one pass over the whole sequence."""
    network = merge(model.definition, model.params)
    canvas = canvas_of(*map(jnp.asarray, (image, text, lengths)))
    hidden = jax.jit(lambda canvas: network.hidden(order, canvas))(canvas)
    name = "image" if order == "text_first" else "text"
    return np.asarray(network.logits(getattr(hidden, name), name))


def test_cached_codes_equal_the_full_pass(model):
    """With guidance, so with two streams, and texts of several lengths."""
    text, lengths = model._encode_texts(NAMES, "error")
    empty = np.full_like(text, model.tokenizer.pad_id), np.ones(4, np.int32)
    with jax.default_matmul_precision("highest"):
        drawn = draw_codes(model.model, text, lengths, KEYS, CodeRun(temperature=(0.0, 0.0), guidance=1.5))
        given, without = (full(model.model, "text_first", drawn.tokens, *words) for words in ((text, lengths), empty))
    logits = without + 1.5 * (given - without)
    np.testing.assert_array_equal(drawn.tokens, logits.argmax(-1))
    np.testing.assert_allclose(drawn.log_probs, jax.nn.log_softmax(logits).max(-1), atol=1e-3)
    assert len(np.unique(drawn.tokens)) > 4
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(given)), np.asarray(drawn.tokens)[..., None], -1)
    likely = likelihood(model.model, drawn.tokens, text, lengths, of="image")
    np.testing.assert_allclose(likely, chosen.sum((-1, -2)), atol=1e-2)


def test_cached_texts_equal_the_full_pass(model, codes):
    """Drawn from several tokens, so that wrong texts are among them."""
    sampling = sampling_rows([SamplingConfig(temperature=3.0, top_k=5)] * 4)
    with jax.default_matmul_precision("highest"):
        written = write_texts(model.model, codes, KEYS, sampling)
        tokens, pad = np.asarray(written.tokens), model.tokenizer.pad_id
        lengths = np.minimum((tokens != pad).sum(-1) + 1, 10)
        logits = full(model.model, "image_first", codes, tokens, lengths)
        likely = likelihood(model.model, codes, tokens, lengths, of="text")
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(written.log_probs, np.where(np.arange(10) < lengths[:, None], chosen, 0), atol=1e-3)
    np.testing.assert_allclose(likely, written.log_probs.sum(-1), atol=1e-3)


def test_loss_is_that_of_the_next_token(model, codes):
    text, lengths = model._encode_texts(NAMES, "error")
    batch = {"codes": codes, "tokens": text, "lengths": lengths, "seeds": np.arange(4), "task": np.ones(4, np.int32)}
    network, options = merge(model.model.definition, model.model.params), dataclasses.replace(LOSS, unroll_weight=0.0)
    with jax.default_matmul_precision("highest"):
        terms = jax.jit(lambda batch: magvlt_loss(network, batch, None, options=options))(
            {name: jnp.asarray(array) for name, array in batch.items()}
        )
        expected = -likelihood(model.model, codes, text, lengths, of="text").sum()
    np.testing.assert_allclose(terms["text"].total, expected, rtol=1e-4)
    assert (int(terms["text"].count), int(terms["image"].count)) == (lengths.sum(), 0)
    assert "length" not in terms


@pytest.mark.slow
def test_it_learns_by_heart(tmp_path, monkeypatch):
    data = magvlt_tiny.dataset()
    monkeypatch.setattr(setup, "load_dataset", lambda config: data)
    tokenizer = magvlt_tiny.write_tokenizer(tmp_path / "vqgan")
    run = train(MAGVLT, run_config(tokenizer, model=CAUSAL, loss=LOSS, steps=100), tmp_path / "run", ONE)
    model = open_generator(run.workdir)
    pictures = [ImageInput(Image.fromarray(image)) for image in magvlt_tiny.images()]
    for picture, name in zip(pictures, NAMES, strict=True):
        assert model.caption(picture) == [name]
        drawn = model.draw([name], ImageOptions(temperature=(0.0, 0.0)))
        np.testing.assert_array_equal(drawn.codes, model.encode([picture]))


def test_it_draws_and_describes_through_the_same_interface(model):
    assert model.makes == {"text", "image"}
    options = ImageOptions(n=2, candidates=2, guidance=1.5, temperature=(0.0, 0.0))
    drawn = model.draw([NAMES[1]], options)
    text, lengths = model._encode_texts([NAMES[1]], "error")
    settings = CodeRun(temperature=(0.0, 0.0), top_k=256, guidance=1.5)
    expected = draw_codes(model.model, text.repeat(4, 0), lengths.repeat(4), KEYS, settings).tokens[:2]
    np.testing.assert_array_equal(drawn.codes, expected)
    assert [canvas.finish for canvas in model.canvases([NAMES[1]], options, previews=2)] == ["stop"]
    picture = ImageInput(Image.fromarray(magvlt_tiny.images()[0]))
    ((*_, answer),) = model.answers([[picture]], AnswerOptions(n=4))
    assert (answer.finish == "stop") == (len(answer.tokens) < 10)
    assert answer.logprob < 0
    assert len(model.caption(picture, n=2, candidates=2)) == 2


def test_refusals(model, folder, tmp_path):
    picture = ImageInput(Image.fromarray(magvlt_tiny.images()[0]))
    for prompt, options, message in (
        ([picture, "a"], {"mask": np.ones((16, 16), bool)}, "draws code by code, from the first: leave out mask"),
        (["a"], {"steps": 4, "places": "halton"}, "leave out steps, places"),
    ):
        with pytest.raises(ValueError, match=message):
            model.draw(prompt, ImageOptions(**options))
    with pytest.raises(ValueError, match="no trace of steps"):
        model.draw(["a"], ImageOptions(), trace=3)
    for call in (
        lambda: model.infill_text(picture, "a [MASK]"),
        lambda: model.caption(picture, lengths=2),
        lambda: model.caption(picture, run=TextRun(steps=3)),
    ):
        with pytest.raises(ValueError, match=r"leave out \[MASK\], lengths and run"):
            call()
    with pytest.raises(ValueError, match="no pairs from nothing"):
        model.generate_pair()
    planned = SimpleNamespace(config=SimpleNamespace(model=CAUSAL))
    with pytest.raises(ConfigError, match=r"model\.causal: decoding is planned for the masked model alone"):
        MAGVLT.decode_program(planned, 4, None)
    with pytest.raises(CheckpointError, match="but this one is causal"):
        published(folder)
    with pytest.raises(ConfigError, match=r"model\.causal: has neither masks nor a length to predict; set loss"):
        train(MAGVLT, run_config("vqgan", model=CAUSAL), tmp_path / "run", ONE)

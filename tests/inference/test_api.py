"""The interface for users: prompts of images and text, generation, hidden states, attentions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax import Magma
from magma_jax.data.images import ImageError, ImageInput
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return Magma(tiny.MODEL, split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1], tiny.dataset().tokenizer)


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8)
    return ImageInput(Image.fromarray(pixels))


def test_a_prompt_mixes_images_and_text_in_any_order(model, image):
    words = len(model.tokenizer.encode("red square"))
    positions = tiny.MODEL.encoder.positions
    prompt = [image, "red square", image]
    embeddings = model.preprocess_inputs(prompt)
    assert embeddings.shape == (1, 2 * positions + words, 32)
    assert prompt == [image, "red square", image]
    np.testing.assert_array_equal(embeddings[:, :positions], embeddings[:, positions + words :])
    assert model.preprocess_inputs(["red square"]).shape == (1, words, 32)
    assert model.preprocess_inputs(["red square", image]).shape == (1, positions + words, 32)


def test_calling_twice_gives_the_same_answer(model, image):
    first = model.generate(model.preprocess_inputs([image, "A"]), max_steps=8)
    assert model.generate(model.preprocess_inputs([image, "A"]), max_steps=8) == first


def test_ragged_batches_give_each_row_what_it_gives_alone(model, image):
    prompts = [[image, "A picture of"], ["Q: What"], [image, image, "a"]]
    for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0, top_p=0.9)):
        together = model.generate_tokens(model.preprocess_batch(prompts), 8, sampling, seed=[3, 4, 5])
        for row, (prompt, seed) in enumerate(zip(prompts, (3, 4, 5), strict=True)):
            alone = model.generate_tokens(model.preprocess_inputs(prompt), 8, sampling, seed=[seed])
            np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])


def test_one_seed_draws_differently_for_equal_prompts(model):
    batch = model.preprocess_batch([["a red"]] * 4)
    result = model.generate_tokens(batch, 8, SamplingConfig(temperature=2.0), seed=0)
    assert len({tuple(row) for row in np.asarray(result.tokens).tolist()}) > 1
    alone = model.generate_tokens(model.preprocess_inputs(["a red"]), 8, SamplingConfig(temperature=2.0), seed=[0])
    np.testing.assert_array_equal(alone.tokens[0], result.tokens[0])
    with pytest.raises(ValueError, match="2 seeds for 4 rows"):
        model.generate_tokens(batch, 8, seed=[0, 1])


def test_ids_without_an_embedding_are_never_generated(model):
    biased = dict(model.params)
    biased["lm/lm_head/bias"] = biased["lm/lm_head/bias"].at[300:].set(100.0)
    result = Magma(tiny.MODEL, biased, model.tokenizer).generate_tokens(
        model.preprocess_inputs(["a"]), 8, SamplingConfig(temperature=2.0)
    )
    assert int(result.tokens.max()) < tiny.MODEL.lm.vocab_rows


def test_hidden_states_and_attentions(model):
    embeddings = model.preprocess_inputs(["a red square"])
    length = embeddings.shape[1]
    output = model(embeddings, output_hidden_states=True, output_attentions=True)
    assert output.logits.shape == (1, length, tiny.MODEL.lm.head_rows)
    assert output.hidden_states.shape == (3, 1, length, 32)
    assert output.attentions.shape == (2, 1, 2, length, length)
    np.testing.assert_allclose(output.attentions.sum(-1), 1, rtol=1e-5)
    assert not np.triu(np.asarray(output.attentions), 1).any()
    assert model(embeddings).hidden_states is None


def test_removing_adapters_leaves_the_language_model_bit_for_bit(model):
    bare = model.remove_adapters()
    embeddings = model.preprocess_inputs(["a red square"])
    assert not any("adapter" in path for path in bare.params)
    silent = {path: jnp.zeros_like(leaf) if "_adapter/" in path else leaf for path, leaf in model.params.items()}
    expected = Magma(tiny.MODEL, silent, model.tokenizer)(embeddings).logits
    np.testing.assert_array_equal(bare(embeddings).logits, expected)
    assert not np.array_equal(model(embeddings).logits, expected)


def test_text_that_spells_a_special_token_is_text(model):
    ids = model.tokenizer.encode("<|image|>")
    assert model.tokenizer.image_id not in ids
    assert model.preprocess_inputs(["<|image|>"]).shape[1] == len(ids)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 0 is empty"),
        ([""], "prompt 0 is empty"),
        ("a string", "a prompt is a list"),
        ([3], "a prompt holds text and ImageInput, not int"),
    ],
)
def test_prompts_that_are_none(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        model.preprocess_inputs(prompt)


def test_a_missing_or_broken_image_names_its_file(model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        model.preprocess_inputs([ImageInput(broken)])


def test_more_than_the_context_is_refused_before_any_work(model):
    embeddings = model.preprocess_inputs(["a"])
    with pytest.raises(ValueError, match="context holds 64"):
        model.generate(embeddings, max_steps=64)
    with pytest.raises(ValueError, match="at least 1"):
        model.generate(embeddings, max_steps=0)


def test_lengths_of_one_bucket_share_a_program(model, caplog):
    with jax.log_compiles():
        for text, steps in (("a", 33), ("a red", 40), ("a red square", 48)):  # lengths of prompts, and of answers
            result = model.generate_tokens(model.preprocess_inputs([text]), steps)
            assert result.tokens.shape == result.logprobs.shape == (1, steps)
    assert sum("Finished XLA compilation of jit(generate_program)" in message for message in caplog.messages) == 1

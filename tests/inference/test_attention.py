"""What an answer looked at: the weights, their rollout, words, and the overlay."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax import Magma
from magma_jax.data.images import ImageInput
from magma_jax.families.magma.images import image_spec
from magma_jax.inference.attention_maps import ALL_HEADS, attend, attention_maps, split_words
from magma_jax.inference.overlay import overlay, sheet
from magma_jax.models.magma import MagmaModel
from magma_jax.models.prefix import PrefixConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.models.vision.efficientnet_lite import EfficientNetLiteConfig
from magma_jax.nn.modules import split
from tests import tiny


@pytest.fixture(scope="module")
def model():
    params = split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1]
    # Larger weights, so that attention has something to prefer.
    return Magma(tiny.MODEL, {k: 4 * v if v.ndim > 1 else v for k, v in params.items()}, tiny.dataset().tokenizer)


def image(seed, size=(80, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return ImageInput(Image.fromarray(pixels))


PROMPT = [image(0), "Q: What", image(1), image(0), " A:"]


@pytest.fixture(scope="module")
def seen(model):
    return attention_maps(model, PROMPT, max_steps=9)


def attentions(model, tokens):
    embeddings = [model.preprocess_inputs(PROMPT)[0], model.embed_tokens(tokens[:-1])]
    output = model(jnp.concatenate(embeddings)[None], output_attentions=True)
    return np.asarray(output.attentions)[:, 0]


def columns(model):
    words = len(model.tokenizer.encode("Q: What"))
    return np.concatenate([np.arange(4), 4 + words + np.arange(8)])


def test_weights_are_those_of_the_whole_forward_pass(model, seen):
    whole = attentions(model, seen.tokens)
    rows = np.arange(whole.shape[-1] - len(seen.tokens), whole.shape[-1])
    expected = whole[:, :, rows][..., columns(model)].reshape(2, 2, -1, 3, 4)
    assert seen.weights.shape == expected.shape == (2, 2, 9, 3, 4)
    np.testing.assert_allclose(seen.weights, expected, atol=2e-5)
    assert seen.weights.std() > 0.05


def test_rollout_multiplies_the_layers(model, seen):
    whole = attentions(model, seen.tokens).mean(1)
    both = [(layer + np.eye(len(layer))) / 2 for layer in whole]
    expected = (both[1] @ both[0])[-len(seen.tokens) :, columns(model)].reshape(-1, 3, 4)
    np.testing.assert_allclose(seen.rollout, expected, atol=2e-5)


def test_the_answer_is_that_of_generate_and_may_be_given(model, seen):
    assert seen.text == model.generate(model.preprocess_inputs(PROMPT), 9, temperature=0.0)[0]
    again = attention_maps(model, PROMPT, seen.tokens)
    np.testing.assert_array_equal(again.weights, seen.weights)
    text = attention_maps(model, PROMPT, " a red square")
    assert (text.text, [word.text for word in text.words]) == (" a red square", [" a", " red", " square"])


def test_maps_of_words(seen):
    word = seen.words[-1]
    expected = seen.weights[1, 0, word.start : word.stop, 2].mean(0).reshape(2, 2)
    last = len(seen.words) - 1
    np.testing.assert_array_equal(seen.map(last, image=2, layer=1, head=0), expected)
    heads = [seen.map(0, layer=1, head=head) for head in (0, 1)]
    np.testing.assert_allclose(seen.map(0, layer=1), np.mean(heads, axis=0), rtol=1e-6)
    relative = [seen.map(i, relative=True) for i in range(len(seen.words))]
    np.testing.assert_allclose(np.mean(relative, axis=0), 1, rtol=1e-5)
    assert seen.share(0) == pytest.approx(sum(seen.map(0, image=i).sum() for i in range(3)), rel=1e-6)
    with pytest.raises(ValueError, match="of which layer"):
        seen.map(0, head=1)


def test_padding_to_one_length_changes_nothing(model, seen):
    encoded = model.layout(PROMPT)
    heads = np.array([[1, 1], [0, ALL_HEADS]])
    rollout, weights = attend(model, encoded, seen.tokens, heads, length=64, images=4)
    np.testing.assert_allclose(rollout, seen.rollout, atol=2e-5)
    np.testing.assert_allclose(weights[0], seen.weights[1, 1], atol=2e-5)
    np.testing.assert_allclose(weights[1], seen.weights[0].mean(0), atol=2e-5)


@pytest.mark.parametrize(
    ("prompt", "answer", "says"),
    [
        (["a"], "b", "no image to look at"),
        ([image(0)], "", "the answer is empty"),
        ([image(0)], "a red square " * 40, "at most 64 fit"),
        ([], "a", "the prompt is empty"),
    ],
)
def test_what_cannot_be_looked_at(model, prompt, answer, says):
    with pytest.raises(ValueError, match=says):
        attention_maps(model, prompt, answer)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" a man\u2019s hat", [" a", " man\u2019s", " hat"]),
        ("caf\u00e9 \u732b x", ["caf\u00e9", " \u732b", " x"]),
        ("one", ["one"]),
    ],
)
def test_words_are_whole_characters_between_spaces(model, text, words):
    tokens = model.tokenizer.encode(text)
    found = split_words(model.tokenizer, tokens)
    assert [word.text.strip() for word in found if word.text.strip()] == [
        word.strip() for word in words if word.strip()
    ]
    assert [word.stop for word in found[:-1]] == [word.start for word in found[1:]]
    assert (found[0].start, found[-1].stop) == (0, len(tokens))


def test_what_the_positions_of_a_image_mean():
    def grid(**changes):
        return image_spec(dataclasses.replace(tiny.MODEL, **changes)).grid

    assert grid(encoder=tiny.RESNET) == (2, 2, "")
    assert grid(encoder=CLIPViTConfig(output="pooled")) is None
    assert "encoder's attention mixes" in grid(encoder=CLIPViTConfig(output="grid")).note
    quickstart = EfficientNetLiteConfig(taps=(4, 10, "head"), statistics=("stem", 0, 2))
    assert grid(encoder=quickstart) == (4, 4, "every position also carries the colours of the whole image")
    assert "the prefix mixes" in grid(encoder=tiny.RESNET, prefix=PrefixConfig(mapping="transformer")).note


def test_pooled_positions_are_no_places(seen):
    pooled = dataclasses.replace(seen, grid=None)
    with pytest.raises(ValueError, match="are not spatial"):
        pooled.map(0)


def test_an_overlay_colours_cells_and_darkens_what_is_not_seen():
    sampled = np.asarray(overlay(Image.new("RGB", (40, 20), "white"), np.array([[0.0, 0.1], [0.2, 0.4]]), size=100))
    assert sampled.shape == (100, 200, 3)
    assert sampled[50, 10].max() < 100  # left of the square in the middle
    np.testing.assert_array_equal(sampled[10, 60], 255)
    red = sampled[..., 0].astype(int) - sampled[..., 1]
    assert 0 < red[10, 140] < red[90, 60] < red[90, 140]
    same = overlay(Image.new("P", (8, 8)), np.full((2, 2), 0.25), size=8)
    np.testing.assert_array_equal(same, 0)


def test_a_sheet_has_a_tile_for_every_word(seen):
    page = seen.sheet(layer=0)
    count, (width, height) = len(seen.words), seen.overlay(0).size
    assert page.width == 12 + min(count, 4) * (width + 12)
    assert page.height == 12 + -(-count // 4) * (height + 48)
    long = sheet([(Image.new("RGB", (50, 50)), "a very long word that does not fit")])
    assert long.size == (74, 110)

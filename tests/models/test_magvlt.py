"""MAGVLT's transformer at its released sizes, and what its masks and heads must not do."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.families.magvlt.sharding import SHARDINGS, roles
from magma_jax.models.magvlt.config import BASE, LARGE, MagvltConfig
from magma_jax.models.magvlt.layout import layout_of
from magma_jax.models.magvlt.model import MagvltModel, canvas_of, joined, parted
from magma_jax.nn.modules import abstract, parameter_count
from magma_jax.published.keymap.engine import to_theirs
from magma_jax.published.magvlt_keys import transformer_table
from magma_jax.runtime.sharding import SHARED, MeshConfig, make_mesh, parameter_shardings
from magma_jax.training.step.optim import label_parameters

TINY = MagvltConfig(
    layers=2,
    width=32,
    heads=4,
    image_rows=37,
    text_rows=53,
    image_positions=16,
    text_positions=8,
    attention_dropout=0.2,
    residual_dropout=0.2,
)


@pytest.fixture(scope="module")
def model():
    return MagvltModel(TINY, rngs=nnx.Rngs(0))


def canvas(seed=0, **changes):
    rng = np.random.default_rng(seed)
    values = {
        "image": jnp.asarray(rng.integers(0, 37, (2, 16)), jnp.int32),
        "text": jnp.asarray(rng.integers(0, 53, (2, 8)), jnp.int32),
        "text_lengths": jnp.array([5, 8], jnp.int32),
    }
    return canvas_of(**(values | changes))


@pytest.mark.parametrize(
    ("config", "numbers", "tensors"), [(BASE, 371_533_056, 395), (LARGE, 795_228_672, 587)], ids=["base", "large"]
)
def test_full_size(config, numbers, tensors):
    """Numbers and tensors of the released transformers; who learns; and one sharding row for each."""
    _, shapes, types = abstract(lambda: MagvltModel(config, rngs=nnx.Rngs(0)))
    assert parameter_count(shapes) == numbers
    assert len(to_theirs(transformer_table(), shapes)) == tensors
    assert set(label_parameters(types, roles(config)).values()) == {"transformer", "head"}
    for path in shapes:
        assert len([pattern for pattern, _ in (*SHARDINGS, *SHARED) if re.fullmatch(pattern, path)]) == 1, path
    assert config.length == 324
    assert layout_of(config, "image_first").bot == 259


def test_shardings_split_the_large_ones():
    _, shapes, _ = abstract(lambda: MagvltModel(BASE, rngs=nnx.Rngs(0)))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, model=2))
    found = parameter_shardings(shapes, mesh, SHARDINGS)
    for path, leaf in shapes.items():
        if leaf.size >= 2**20:
            assert found[path].num_devices == 8
            assert np.prod(found[path].shard_shape(leaf.shape)) * 8 == leaf.size, path


def test_text_after_its_length_changes_nothing(model):
    """Of the rest; in text-first order the padded rows see only themselves."""
    first, other = canvas(), canvas()
    other = other._replace(text=other.text.at[0, 5:].set(1))
    for order in ("text_first", "image_first"):
        a, b = model.hidden(order, first), model.hidden(order, other)
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.text[0, :5], b.text[0, :5])
        np.testing.assert_array_equal(a.bot, b.bot)
        assert bool(jnp.all(jnp.isfinite(a.text)))


def test_a_caption_vector_is_of_the_visible_text_and_only_for_drawing():
    model = MagvltModel(dataclasses.replace(TINY, caption_vector=True), rngs=nnx.Rngs(0))
    plain = canvas()
    other = plain._replace(text=plain.text.at[0, 0].set(1))
    padded = plain._replace(text=plain.text.at[0, 5:].set(1))
    masked = jnp.zeros((2, 8), bool).at[0, 0].set(True)

    def code(order, canvas):
        return model.embed(order, canvas)[0, layout_of(TINY, order).image]

    assert np.abs(code("text_first", plain) - code("text_first", other)).max() > 0
    np.testing.assert_array_equal(code("text_first", plain), code("text_first", padded))
    np.testing.assert_array_equal(code("image_first", plain), code("image_first", other))
    hidden = (canvas._replace(text_masked=masked) for canvas in (plain, other))
    np.testing.assert_array_equal(*(code("text_first", canvas) for canvas in hidden))


@pytest.mark.parametrize(("order", "second"), [("text_first", "image"), ("image_first", "text")])
def test_a_context_head_reads_what_comes_first_and_is_visible(order, second):
    """The context, beside the states of the second modality alone, is of visible tokens in any order."""
    model = MagvltModel(dataclasses.replace(TINY, context_head=True), rngs=nnx.Rngs(0))
    first = "text" if second == "image" else "image"
    plain = canvas(text_lengths=jnp.array([5, 5]))
    tokens, count = getattr(plain, first), 5 if first == "text" else 16
    other = plain._replace(**{first: tokens.at[0, 0].set((tokens[0, 0] + 1) % 37)})
    turned = plain._replace(**{first: tokens.at[:, :count].set(tokens[:, :count][:, ::-1])})
    padded = plain._replace(text=plain.text.at[0, 5:].set(1))

    def context(canvas):
        hidden = model.hidden(order, canvas)
        assert getattr(hidden, first).shape[-1] == 32
        states = getattr(hidden, second)
        assert states.shape[-1] == 64
        assert bool(jnp.all(states[:, :, 32:] == states[:, :1, 32:]))
        return states[0, 0, 32:]

    assert float(jnp.abs(context(plain) - context(other)).max()) > 1e-4
    np.testing.assert_allclose(context(plain), context(turned), atol=1e-6)
    if first == "text":
        np.testing.assert_array_equal(context(plain), context(padded))
    masked = {f"{first}_masked": jnp.zeros(getattr(plain, first).shape, bool).at[0, 0].set(True)}
    np.testing.assert_array_equal(context(plain._replace(**masked)), context(other._replace(**masked)))
    nothing = {f"{first}_masked": jnp.ones(getattr(plain, first).shape, bool)}
    np.testing.assert_array_equal(context(plain._replace(**nothing)), model.context_proj.bias[...])


def test_a_context_head_moves_all_logits_of_a_sample_alike():
    model = MagvltModel(dataclasses.replace(TINY, context_head=True), rngs=nnx.Rngs(0))
    states = jax.random.normal(jax.random.key(0), (3, 32))
    context = jnp.broadcast_to(jnp.arange(32.0), (3, 32))
    with jax.default_matmul_precision("highest"):
        moved = model.logits(jnp.concatenate([states, context], -1), "image") - model.logits(states, "image")
        np.testing.assert_allclose(moved, context @ model.wte.weight[:37].T, atol=1e-4)


def test_rows_of_tokens_are_as_long_as_asked():
    for std in (0.02, 0.1):
        model = MagvltModel(dataclasses.replace(TINY, token_std=std), rngs=nnx.Rngs(0))
        assert float(model.wte.weight[...].std()) == pytest.approx(std, rel=0.1)
        assert float(model.special.weight[...].std()) == pytest.approx(0.02, rel=0.2)
    with pytest.raises(ValueError, match="token_std must be positive"):
        dataclasses.replace(TINY, token_std=0.0)


def test_codes_that_share_a_position_begin_as_their_mean():
    """And hear the same from their position; noise tells them apart."""
    model = MagvltModel(dataclasses.replace(TINY, image_patch=2), rngs=nnx.Rngs(0))
    codes = jax.random.normal(jax.random.key(0), (4, 32))
    np.testing.assert_allclose(model.join_proj(codes.reshape(-1)), codes.mean(0), atol=1.0)
    heard = model.part_proj(codes[0]).reshape(4, 32)
    np.testing.assert_allclose(heard, jnp.broadcast_to(codes[0], (4, 32)), atol=0.5)
    assert float(jnp.abs(heard - heard[0]).max()) > 0.01


def test_codes_that_share_a_position():
    """Four positions instead of sixteen; every code has its place, before the first layer and in the head."""
    config = dataclasses.replace(TINY, image_patch=2, layers=1)
    assert config.length == config.image_places + 12 == 16
    model = MagvltModel(config, rngs=nnx.Rngs(0))
    grid = jnp.arange(16.0)[None, :, None]
    places = joined(config, grid)
    assert places[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(parted(config, places), grid)
    first = canvas()
    start = layout_of(config, "text_first").image
    for code, place in ((5, 0), (6, 1), (15, 3)):
        other = first._replace(image=first.image.at[0, code].add(-1) % 37)
        a, b = (model.embed("text_first", either)[0, start:] for either in (first, other))
        assert (np.abs(a - b).max(-1) > 0).tolist() == [i == place for i in range(4)]
    for order in ("text_first", "image_first"):
        hidden = model.hidden(order, first)
        assert model.logits(hidden.image, "image").shape == (2, 16, 37)
        assert hidden.text.shape == (2, 8, 32)
    for path in abstract(lambda: MagvltModel(config, rngs=nnx.Rngs(0)))[1]:
        assert len([pattern for pattern, _ in (*SHARDINGS, *SHARED) if re.fullmatch(pattern, path)]) == 1, path
    with pytest.raises(ValueError, match="image_patch 3 does not divide the 4 codes of a row"):
        dataclasses.replace(TINY, image_patch=3)


def test_attention_is_bidirectional(model):
    first, other = canvas(), canvas()
    other = other._replace(image=other.image.at[:, 15].add(-1).clip(0))
    a, b = model.hidden("image_first", first), model.hidden("image_first", other)
    assert np.abs(a.image[:, 0] - b.image[:, 0]).max() > 0


def test_bot_sees_no_text_in_one_layer():
    """With one layer nothing of the text can reach it, not even by way of the image."""
    model = MagvltModel(dataclasses.replace(TINY, layers=1), rngs=nnx.Rngs(0))
    first = canvas()
    other = first._replace(text=first.text[::-1], text_lengths=jnp.array([1, 3], jnp.int32))
    np.testing.assert_array_equal(*(model.hidden("image_first", batch).bot for batch in (first, other)))


def test_masked_tokens_are_unknown_and_selectors_matter(model):
    masked = jnp.ones((2, 16), bool)
    a, b = (
        model.hidden("text_first", canvas(image=image, image_masked=masked)).image
        for image in (jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16), jnp.int32))
    )
    np.testing.assert_array_equal(a, b)
    left, right = (model.hidden("text_first", canvas(selectors=jnp.full(2, selector))).image for selector in (6, 7))
    assert np.abs(left - right).max() > 0


def test_half_of_the_vocabulary_is_computed(model):
    """The head's product has as many columns as the modality has tokens."""
    hidden = jnp.zeros((2, 16, 32))
    assert model.logits(hidden, "image").shape == (2, 16, 37)
    assert model.logits(hidden, "text").shape == (2, 16, 53)

    def products(modality):
        text = jax.make_jaxpr(lambda h: model.logits(h, modality))(hidden).pretty_print()
        return {int(size) for size in re.findall(r"f32\[2,16,(\d+)\] = dot_general", text)}

    assert products("image") == {32, 37}
    assert products("text") == {32, 53}


def test_dropout_and_dtype(model):
    keys = jax.random.split(jax.random.key(0))
    a, b = (model.hidden("image_first", canvas(), dropout_key=key).bot for key in keys)
    assert np.abs(a - b).max() > 0
    hidden = model.hidden("image_first", canvas(), dtype=jnp.bfloat16)
    assert hidden.text.dtype == jnp.bfloat16
    assert model.logits(hidden.text, "text").dtype == model.length_logits(hidden.bot).dtype == jnp.float32


def test_remat_changes_nothing(model):
    a, b = (model.hidden("image_first", canvas(), remat=remat).image for remat in ("none", "full"))
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "5 heads do not divide the width 32"),
        ({"text_positions": 0}, "text_positions must be at least 1"),
        ({"residual_dropout": 1.0}, "residual_dropout must be at least 0 and below 1"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_unknown_order():
    with pytest.raises(Exception, match="sideways"):
        layout_of(TINY, "sideways")

"""MAGMA's parts in every combination a config can name."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.families.magma.flops import step_flops
from magma_jax.families.magma.images import image_spec
from magma_jax.models.magma import MagmaModel
from magma_jax.models.prefix import ImagePrefix, PrefixConfig, pixel_shuffle
from magma_jax.models.vision.catalog import PUBLISHED_ENCODERS, build_encoder
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.nn.modules import PrefixParam, abstract, merge, split
from tests import tiny

# Positions and channels that an image of the published size gives (Radford et al., 2021; EfficientNet at 128 px; model
# cards).
GRIDS = {
    "RN50": (49, 2048),
    "RN101": (49, 2048),
    "RN50x4": (81, 2560),
    "RN50x16": (144, 3072),
    "RN50x64": (196, 4096),
    "ViT-B/32": (512,),
    "ViT-B/16": (512,),
    "ViT-L/14": (768,),
    "ViT-B/32-grid": (49, 768),
    "ViT-B/16-grid": (196, 768),
    "ViT-L/14-grid": (256, 1024),
    "nf_resnet50": (2048,),
    "efficientnet_lite0": (16, 1280),
    "google/siglip-base-patch16-224": (196, 768),
    "google/siglip-base-patch16-384": (576, 768),
    "google/siglip-large-patch16-256": (256, 1024),
    "google/siglip-so400m-patch14-384": (729, 1152),
    "google/siglip2-base-patch16-224": (196, 768),
    "google/siglip2-so400m-patch14-384": (729, 1152),
    "google/siglip2-base-patch16-naflex": (256, 768),
    "facebook/dinov2-small": (1369, 384),
    "facebook/dinov2-base": (1369, 768),
    "facebook/dinov2-large": (1369, 1024),
    "facebook/dinov2-giant": (1369, 1536),
    "facebook/dinov2-with-registers-base": (1369, 768),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (196, 384),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": (196, 768),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": (196, 1024),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": (196, 1280),
}


@pytest.mark.parametrize("name", PUBLISHED_ENCODERS)
def test_published_encoders_give_what_their_config_announces(name):
    config = PUBLISHED_ENCODERS[name]
    graphdef, params, _ = abstract(lambda: build_encoder(config, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
    features = jax.eval_shape(lambda params, images: merge(graphdef, params)(images), params, images)
    assert features.shape == (2, *GRIDS[name])
    assert config.channels == GRIDS[name][-1]
    assert config.positions == (GRIDS[name][0] if len(GRIDS[name]) == 2 else None)


@pytest.mark.parametrize("output", ["pooled", "grid"])
@pytest.mark.parametrize("mapping", ["linear", "mlp", "transformer"])
def test_every_mapping_gives_word_like_vectors(mapping, output):
    encoder = CLIPViTConfig(1, 32, 2, 32, 64, 16, output=output)
    prefix = PrefixConfig(mapping=mapping, image_positions=3, transformer_heads=2)
    config = dataclasses.replace(tiny.MODEL, encoder=encoder, prefix=prefix)
    graphdef, params, types = abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    embedded = jax.eval_shape(lambda params, images: merge(graphdef, params).embed_images(images), params, images)
    assert embedded.shape == (2, 3 if output == "pooled" else 4, 32)
    assert {types[path].__name__ for path in params if not path.startswith(("lm/", "image_prefix/encoder/"))} == {
        "PrefixParam"
    }


@pytest.mark.parametrize(("mapping", "positions"), [("linear", 4), ("mlp", 4), ("transformer", 4), ("resampler", 5)])
def test_fewer_positions_than_the_grid(mapping, positions):
    encoder = CLIPViTConfig(1, 32, 2, 16, 64, output="grid")
    prefix = PrefixConfig(mapping=mapping, image_positions=5, shuffle=2, transformer_heads=2, standardize=True)
    config = dataclasses.replace(tiny.MODEL, encoder=encoder, prefix=prefix)
    assert image_spec(config).positions == positions
    assert (image_spec(config).grid is None) == (mapping == "resampler")
    graphdef, params, types = abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    embedded = jax.eval_shape(lambda params, images: merge(graphdef, params).embed_images(images), params, images)
    assert embedded.shape == (2, positions, 32)
    first = "image_prefix/proj_in/weight" if mapping == "mlp" else "image_prefix/proj/weight"
    assert params[first].shape == (32, 4 * 32)
    prefix_types = {
        types[path] for path in params if path.startswith(("image_prefix/resampler", "image_prefix/queries"))
    }
    assert prefix_types == ({PrefixParam} if mapping == "resampler" else set())
    labels = {path: "frozen" if path.startswith("lm/") else "adapter" for path in params}
    batch = {"tokens": (2, 8), "images": (2, 64, 64, 3)}
    assert step_flops(config, params, labels, batch).trained > 0


def test_pixel_shuffle_joins_squares():
    grid = jnp.arange(16).reshape(1, 16, 1).astype(jnp.float32)
    assert pixel_shuffle(grid, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_resampler_reads_every_feature_with_every_query():
    prefix = PrefixConfig(mapping="resampler", image_positions=3, transformer_heads=2, dropout=0.0)
    create = functools.partial(ImagePrefix, SimpleNamespace(config=tiny.MODEL.encoder), 32, prefix)
    definition = abstract(lambda: create(rngs=nnx.Rngs(0)))[0]
    params = jax.jit(lambda: split(create(rngs=nnx.Rngs(0)))[1])()
    features = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    changed = [features + np.eye(4, dtype=np.float32)[place][:, None] for place in range(4)]
    run = jax.jit(lambda params, features: merge(definition, params)(features))
    seen, reversed_, *others = np.asarray(run(params, np.stack([features, features[::-1], *changed])))
    assert not np.allclose(seen[0], seen[1])
    assert all((np.abs(other - seen).max(-1) > 1e-6).all() for other in others)
    # Queries know no order of the features; positions come from the encoder.
    np.testing.assert_allclose(reversed_, seen, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "encoder", "says"),
    [
        (PrefixConfig(shuffle=2), CLIPViTConfig(1, 32, 2, 32, 96, 16, output="grid"), "2 x 2 do not divide .* 9 pos"),
        (PrefixConfig(shuffle=2), CLIPViTConfig(1, 32, 2, 32, 64, 16), "need an encoder with a grid"),
        (PrefixConfig(mapping="resampler"), CLIPViTConfig(1, 32, 2, 32, 64, 16), "need an encoder with a grid"),
    ],
)
def test_prefixes_that_do_not_fit_the_encoder(prefix, encoder, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(tiny.MODEL, prefix=prefix, encoder=encoder)


@functools.cache
def _model(classes=0, begin=None):
    return MagmaModel(dataclasses.replace(tiny.MODEL, classes=classes, begin=begin), rngs=nnx.Rngs(0))


def test_caption_logits_are_those_of_the_whole_sequence():
    model = _model()
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 300)
    features = jax.random.normal(jax.random.key(1), (2, 4, 32))
    prefix = model.embed_features(features)
    whole = model(jnp.concatenate([prefix, model.embed_tokens(tokens)], axis=1)).hidden
    expected = model.logits(whole)[:, prefix.shape[1] - 1 : -1]
    np.testing.assert_allclose(model.logits(model.caption_hidden(features, tokens)), expected, atol=1e-5)


def test_a_begin_of_text_stands_before_the_image():
    """In training, packed or not, as in the layout of a prompt."""
    definition, params = split(_model(begin=5))

    @jax.jit
    def run(params, features, tokens):
        model = merge(definition, params)
        begin, prefix = model.embed_tokens(jnp.full((2, 1), 5)), model.embed_features(features)
        whole = model(jnp.concatenate([begin, prefix, model.embed_tokens(tokens)], axis=1)).hidden
        segments, places = jnp.repeat(jnp.array([[1, 2]]), 7, axis=1), jnp.tile(jnp.arange(7), 2)[None]
        packed = model.packed_hidden(features[None], tokens.reshape(1, 14), segments, places)
        expected = whole[:, prefix.shape[1] : -1]
        return expected, model.caption_hidden(features, tokens), packed.reshape(expected.shape)

    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 300)
    expected, *found = run(params, jax.random.normal(jax.random.key(1), (2, 4, 32)), tokens)
    for one in found:
        np.testing.assert_allclose(one, expected, atol=1e-5)
    with pytest.raises(ValueError, match="begin 300 is none of the 300 ids"):
        dataclasses.replace(tiny.MODEL, begin=300)


def test_padding_on_the_right_changes_nothing_before_it():
    model = _model()
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 300)
    features = jax.random.normal(jax.random.key(1), (2, 4, 32))
    padded = jnp.pad(tokens, ((0, 0), (0, 20)), constant_values=298)
    np.testing.assert_allclose(
        model.caption_hidden(features, padded)[:, :7], model.caption_hidden(features, tokens), atol=1e-5
    )


def test_dropout_needs_a_key_and_differs_with_it():
    model = _model()
    features = jax.random.normal(jax.random.key(1), (2, 4, 32))
    plain = model.embed_features(features)
    np.testing.assert_array_equal(model.embed_features(features), plain)
    first, second = (model.embed_features(features, dropout_key=jax.random.key(i)) for i in range(2))
    assert not np.array_equal(first, plain)
    assert not np.array_equal(first, second)


def test_class_scores_read_the_last_token_of_each_row():
    model = _model(classes=3)
    embeddings = jax.random.normal(jax.random.key(0), (2, 9, 32))
    lengths = jnp.array([5, 9])
    scores = model.class_logits(embeddings, lengths)
    assert scores.shape == (2, 3)
    np.testing.assert_allclose(scores[:1], model.class_logits(embeddings[:1, :5], lengths[:1]), atol=1e-5)
    with pytest.raises(ValueError, match="no classification head"):
        _model().class_logits(embeddings, lengths)

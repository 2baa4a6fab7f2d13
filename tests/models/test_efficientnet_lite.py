import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.models.vision.efficientnet_lite import (
    LITE_MEAN,
    LITE_STD,
    DepthwiseConv2d,
    EfficientNetLite,
    EfficientNetLiteConfig,
    same_padding,
)
from magma_jax.nn.modules import Statistic, merge, split, variable_types
from magma_jax.published.efficientnet_lite import TABLE, read_weights, weights_path
from magma_jax.published.keymap.engine import check_table

# Computed with PyTorch's convolutions from the same weights: stem, block 4 and head of the image of `image`.
GOLDEN = Path(__file__).parents[1] / "fixtures" / "efficientnet_lite0.npz"


def image(size: int = 64) -> np.ndarray:
    """Coloured waves, uint8 (1, size, size, 3)."""
    y, x, c = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
    return np.rint(127.5 + 120 * np.sin(x / 5 + c) * np.cos(y / (3 + c)))[None].astype(np.uint8)


def normalised(pixels: np.ndarray) -> jax.Array:
    return jnp.asarray((pixels / 255 - LITE_MEAN[0]) / LITE_STD[0], jnp.float32)


@pytest.fixture(scope="module")
def pretrained():
    graphdef, params = split(EfficientNetLite(EfficientNetLiteConfig(image_size=64), rngs=nnx.Rngs(0)))
    return graphdef, read_weights(params)


@pytest.fixture(scope="module")
def layers(pretrained):
    """Layers of the image of ``image``, by name."""
    run = jax.jit(
        lambda params, images: {str(name): y for name, y in merge(pretrained[0], params).layers(images).items()}
    )
    return run(pretrained[1], normalised(image()))


def test_parity_with_pytorch(layers):
    with np.load(GOLDEN) as golden:
        for name in golden.files:
            np.testing.assert_allclose(layers[name][..., ::8], golden[name], atol=1e-4, rtol=0, err_msg=name)


def test_every_tensor_of_the_package_is_used_or_named(pretrained):
    check_table(TABLE)
    assert weights_path().suffix == ".pth"
    # Tan and Le give 4.7 million for Lite0, 1.28 million of them in the classifier.
    assert 3.3e6 < sum(value.size for value in pretrained[1].values()) < 3.5e6


@pytest.mark.slow
def test_taps_join_layers_averaged_over_cells(pretrained):
    config = EfficientNetLiteConfig(image_size=64, taps=("stem", 4, "head"))
    graphdef, params = split(EfficientNetLite(config, rngs=nnx.Rngs(0)))
    assert params.keys() == pretrained[1].keys()
    images = normalised(image())
    features = merge(graphdef, pretrained[1])(images)
    assert features.shape == (1, config.positions, config.channels) == (1, 4, 32 + 40 + 1280)
    layers = merge(*pretrained).layers(images)
    # The grid goes row by row: its second position is the upper right quarter.
    np.testing.assert_allclose(features[0, 1, :32], layers["stem"][0, :16, 16:].mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(features[0, 2, -1280:], layers["head"][0, 1, 0], atol=1e-5)


def test_statistics_are_added_to_every_cell_or_once_to_joined_cells(pretrained, layers, monkeypatch):
    config = EfficientNetLiteConfig(image_size=64, statistics=("stem", 2))
    known = {name if name in ("stem", "head") else int(name): values for name, values in layers.items()}
    monkeypatch.setattr(EfficientNetLite, "layers", lambda self, *_: known)
    model = merge(*pretrained)

    def features(**changes):
        model.config = dataclasses.replace(config, **changes)
        found = model(normalised(image()))
        assert found.shape[-1] == model.config.channels
        return found[0]

    cells, one, joined = features(), features(grid=1), features(joined=True)
    assert (EfficientNetLiteConfig(64, joined=True).positions, one.shape, joined.ndim) == (None, (1, 1392), 1)
    assert cells.shape == (4, 1280 + 2 * (32 + 24))
    np.testing.assert_allclose(cells[:, :1280], layers["head"].reshape(4, 1280), atol=1e-5)
    want = [f(layers[layer][0], (0, 1)) for layer in ("stem", "2") for f in (jnp.mean, jnp.std)]
    np.testing.assert_allclose(cells[:, 1280:], np.tile(np.concatenate(want), (4, 1)), atol=1e-5)
    np.testing.assert_allclose(one[0], cells.mean(0), atol=1e-5)
    np.testing.assert_allclose(joined, np.concatenate([cells[:, :1280].ravel(), cells[0, 1280:]]), atol=1e-5)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 1), (8, 3, 2), (7, 5, 2), (8, 5, 1)])
def test_depthwise_equals_grouped_convolution(size, kernel, stride):
    layer = DepthwiseConv2d(6, kernel, stride, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, size, size, 6))
    want = jax.lax.conv_general_dilated(
        x,
        layer.weight[...],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        feature_group_count=6,
    )
    np.testing.assert_allclose(layer(x), want, atol=1e-5)


def test_same_padding_puts_the_odd_pixel_behind():
    padded = same_padding(jnp.ones((1, 4, 4, 1)), 3, 2)[0, :, :, 0]
    assert padded.shape == (5, 5)
    assert padded[0, 0] == 1
    assert padded[-1, -1] == 0


def test_frozen_statistics_are_no_parameters():
    types = variable_types(EfficientNetLite(EfficientNetLiteConfig(), rngs=nnx.Rngs(0)))
    statistics = {path for path, kind in types.items() if issubclass(kind, Statistic)}
    assert statistics == {path for path in types if "running" in path or "tracked" in path}


@pytest.mark.parametrize(
    "wrong", [{"taps": (16,)}, {"taps": ()}, {"taps": ("neck",)}, {"statistics": (99,)}, {"image_size": 100}]
)
def test_bad_config(wrong):
    with pytest.raises(ValueError, match=r"taps|image_size"):
        EfficientNetLiteConfig(**wrong)


@pytest.mark.parametrize("grid", [0, 3])
def test_a_grid_that_does_not_divide_the_cells_is_refused(grid):
    with pytest.raises(ValueError, match=f"grid {grid} does not divide the 4 cells per side"):
        EfficientNetLiteConfig(image_size=128, grid=grid)

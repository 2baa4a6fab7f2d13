"""Recomputing an encoder's activations changes neither gradients nor the running statistics it leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from magma_jax.models.vision.clip_resnet import Stage
from magma_jax.nn.modules import merge, split


def test_gradients_and_statistics_are_the_same():
    graphdef, params = split(Stage(8, 4, 2, 2, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 8), np.float32))
    learning = {path: leaf for path, leaf in params.items() if path.endswith(("weight", "bias"))}
    statistics = {path: leaf for path, leaf in params.items() if path not in learning}

    def loss(learning, remat):
        stage = merge(graphdef, learning, statistics)
        y = stage(x, "batch", remat)
        after = split(stage)[1]
        return (y**2).sum(), {path: after[path] for path in statistics}

    results = [jax.jit(jax.grad(lambda p, r=r: loss(p, r), has_aux=True))(learning) for r in ("none", "full")]
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result, results[0])
    assert int(results[0][1]["first/bn1/num_batches_tracked"]) == 1

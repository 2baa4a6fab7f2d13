"""Parity with the PyTorch models of open_clip, random weights, where it is installed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.models.vision.clip_resnet import CLIP_RESNETS, CLIPResNet
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.keymap.engine import to_ours
from magma_jax.published.magma_keys import encoder_table

# What other libraries warn about is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


def tensors(module):
    return {key: value.numpy() for key, value in module.state_dict().items()}


def planned(table, module, shapes):
    return {path: jnp.asarray(tensor.read()) for path, tensor in to_ours(table, tensors(module), shapes).items()}


@pytest.mark.slow
def test_rn50x16_equals_open_clip(modified_resnet):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CLIP_RESNETS["RN50x16"], attention_pool=True)
    torch.manual_seed(0)
    theirs = modified_resnet(config.blocks, config.embedding_width, config.pool_heads, config.image_size, config.width)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            # Fresh statistics and scales are the same for every channel, which would hide a wrong one.
            if value.ndim == 1 and "attnpool" not in name:
                value.copy_(torch.rand_like(value) + (0.5 if "weight" in name or "var" in name else -0.5))
    theirs.eval()
    definition, shapes, _ = abstract(lambda: CLIPResNet(config, rngs=nnx.Rngs(0)))
    params = planned(encoder_table(config), theirs, shapes)
    image = np.random.default_rng(0).normal(size=(1, 3, 384, 384)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image)).numpy()
        grid = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(theirs.stem(torch.from_numpy(image))))))

    def run(params, images):
        model = merge(definition, params)
        grid = model(images)
        return grid, model.pool(grid)

    # This one computes a lot, so it is optimized, unlike the other tests' programs.
    options = {"xla_backend_optimization_level": "3", "xla_llvm_disable_expensive_passes": False}
    run = jax.jit(run, compiler_options=options)
    found, pooled = run(params, image.transpose(0, 2, 3, 1))
    grid = grid.numpy().transpose(0, 2, 3, 1).reshape(1, 144, 3072)
    np.testing.assert_allclose(found, grid, atol=1e-4 * np.abs(grid).max())
    np.testing.assert_allclose(pooled, expected, atol=1e-4 * np.abs(expected).max())

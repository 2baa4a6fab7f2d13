"""Checkpoints straight to a dtype and to devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax import Magma
from magma_jax.convert.magma_checkpoint import from_torch, to_safetensors
from magma_jax.convert.verify import read_model_config
from magma_jax.models.magma import SHARDINGS
from magma_jax.runtime.sharding import MeshConfig, make_mesh, parameter_shardings

CASE = "v2_mlp_attn_normal"


@pytest.fixture(scope="module")
def settings(golden):
    return read_model_config(golden / f"{CASE}.json")


@pytest.fixture(scope="module")
def folder(settings, golden_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("loading") / "model"
    from_torch(golden_checkpoint(CASE), path, settings)
    return path


def test_folder_and_file_give_the_same_bf16_weights(folder, settings, golden_checkpoint):
    models = [
        Magma.from_checkpoint(folder, dtype="bfloat16"),
        Magma.from_checkpoint(golden_checkpoint(CASE), dtype="bfloat16", model_config=settings),
    ]
    for model in models:
        assert model.config.dtype == "bfloat16"
        assert {leaf.dtype for leaf in model.params.values()} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
    for path, leaf in models[0].params.items():
        assert np.asarray(leaf).tobytes() == np.asarray(models[1].params[path]).tobytes()
    output = models[0](models[0].embed_tokens([1, 2, 3])[None])
    assert output.logits.dtype == jnp.float32
    assert np.isfinite(output.logits).all()


@pytest.mark.parametrize("kind", ["folder", "safetensors"])
def test_on_a_mesh(kind, folder, tmp_path):
    path = folder
    if kind == "safetensors":
        path = tmp_path / "x.safetensors"
        to_safetensors(folder, path)
    mesh = make_mesh(MeshConfig(fsdp=4, model=2))
    model = Magma.from_checkpoint(path, mesh=mesh)
    shardings = parameter_shardings(model.params, mesh, SHARDINGS)
    for name, leaf in model.params.items():
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), name
    c_fc = model.params["lm/layers/mlp/c_fc/weight"]
    assert c_fc.addressable_shards[0].data.size == c_fc.size // 8
    if kind == "safetensors":
        return
    alone = Magma.from_checkpoint(path)
    ids = alone.embed_tokens([1, 2, 3])[None]
    np.testing.assert_allclose(model(jax.device_get(ids)).logits, alone(ids).logits, atol=2e-4)

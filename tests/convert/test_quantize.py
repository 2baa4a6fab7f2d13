"""Language models in 8 and 4 bits: close to what they were, smaller, and a base to train on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax import Magma
from magma_jax.config import ConfigError
from magma_jax.convert.__main__ import main
from magma_jax.families.magma import MAGMA
from magma_jax.nn.quantized import dequantize, quantize
from magma_jax.storage.model_folder import open_params
from magma_jax.training import loop
from tests import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quantize") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("magma_jax.training.run.setup.load_dataset", lambda config: tiny.dataset())
        tiny.train(tiny.run_config(steps=1), workdir)
    return workdir


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(request, trained):
    out = trained.parent / request.param
    if not out.exists():
        assert main(["quantize", str(trained), str(out), "--to", request.param]) == 0
    return out


@pytest.mark.parametrize(("dtype", "steps"), [("int8", 127.5), ("int4", 7.5)])
@pytest.mark.parametrize("shape", [(6, 256), (2, 5, 34)])
def test_no_weight_is_off_by_more_than_half_a_step(dtype, steps, shape):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    stored, scale = quantize(jnp.asarray(weight), dtype)
    assert stored.dtype == (jnp.int8 if dtype == "int8" else jnp.uint8)
    assert stored.size * 2 == weight.size * (2 if dtype == "int8" else 1)
    groups = weight.reshape(*shape[:-1], scale.shape[-1], -1)
    np.testing.assert_allclose(scale, np.abs(groups).max(-1) / steps, rtol=1e-6)
    back = np.asarray(dequantize(stored, scale, jnp.float32)).reshape(groups.shape)
    assert (np.abs(back - groups) <= 0.501 * np.asarray(scale)[..., None]).all()


def test_logits_are_close_and_what_was_trained_is_there(trained, quantized):
    model, small = Magma.from_checkpoint(trained), Magma.from_checkpoint(quantized)
    for path, leaf in model.params.items():
        if "_adapter/" in path or "image_prefix" in path:
            np.testing.assert_array_equal(leaf, small.params[path])
    assert small.params["lm/lm_head/weight_scale"].dtype == jnp.float32
    expected = model(model.embed_tokens([1, 5, 9])[None]).logits
    error = jnp.abs(small(small.embed_tokens([1, 5, 9])[None]).logits - expected).max() / jnp.abs(expected).max()
    assert 0 < error < (0.02 if quantized.name == "int8" else 0.2)
    texts = small.generate(small.preprocess_inputs(["An image"]), max_steps=3, temperature=0)
    assert texts == small.generate(small.preprocess_inputs(["An image"]), max_steps=3, temperature=0)
    assert Magma.from_checkpoint(quantized, dtype="bfloat16").params["lm/lm_head/weight_scale"].dtype == jnp.float32


@pytest.mark.parametrize("quantized", ["int8"], indirect=True)
def test_adapters_learn_on_a_quantized_base(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr("magma_jax.training.run.setup.load_dataset", lambda config: tiny.dataset())
    model = dataclasses.replace(tiny.MODEL, lm=dataclasses.replace(tiny.MODEL.lm, dtype=quantized.name))
    config = tiny.run_config(model=model, base=str(quantized), steps=2)
    run = tiny.train(config, tmp_path / "run")
    assert "lm/lm_head/weight" in run.frozen
    stored = open_params(quantized)
    for path, leaf in run.frozen.items():
        np.testing.assert_array_equal(np.asarray(leaf), stored[path].read().astype(leaf.dtype))
    assert all(leaf.dtype == jnp.float32 for leaf in run.state.trainable.values())
    learned = "lm/layers/mlp_adapter/up/weight"
    assert not np.array_equal(run.state.trainable[learned], stored[learned].read())
    assert Magma.from_checkpoint(tmp_path / "run").config.lm.dtype == quantized.name
    with pytest.raises(ConfigError, match=r"quantized, set model\.lm\.dtype"):
        loop.train(MAGMA, tiny.run_config(base=str(quantized)), tmp_path / "other", jax.devices()[:1])


@pytest.mark.parametrize("quantized", ["int8"], indirect=True)
def test_what_cannot_be_quantized_is_refused_in_one_line(quantized, trained, tmp_path, capsys):
    assert main(["quantize", str(quantized), str(tmp_path / "again")]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["quantize", str(trained), str(quantized)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert json.loads((quantized / "model.json").read_text())["model"]["lm"]["dtype"] == quantized.name

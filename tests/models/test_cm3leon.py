"""CM3Leon: published sizes, fresh weights, and a random decoder of its type as transformers computes it."""

import dataclasses
import json
import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.config import from_dict, to_dict
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.models.cm3leon import CM3LEON_SIZES, CM3LeonConfig
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.modules import LanguageParam, abstract, merge, parameter_count, split
from magma_jax.published.cm3leon_keys import cm3leon_table, layout_of
from magma_jax.published.keymap.engine import KeyMapError, check_table, to_ours, to_theirs
from magma_jax.storage.files import open_tensors

VOCABULARY = VocabLayout(text=20, image=20, sentinels=5)
TINY = CM3LeonConfig(
    layers=3, width=32, heads=4, feed_forward=64, vocab_rows=128, vocabulary=VOCABULARY, context_length=24
)


@pytest.mark.parametrize(("name", "millions"), [("cm3leon-350m", 373), ("cm3leon-760m", 786), ("cm3leon-7b", 6_730)])
def test_published_sizes(name, millions):
    config = CM3LEON_SIZES[name]
    _, shapes, types = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    d, layers = config.width, config.layers
    assert parameter_count(shapes) == 65_536 * d + (4096 + 2) * d + 12 * layers * d * d
    assert round(parameter_count(shapes) / 1e6) == pytest.approx(millions, rel=0.001)
    assert set(types.values()) == {LanguageParam}
    # No biases, no weights of norms, no head.
    assert {path for path in shapes if not path.startswith("layers/")} == {"wte/weight", "wpe/weight"}
    assert len(shapes) == 2 + 6
    assert VocabLayout().rows <= config.vocab_rows
    assert VocabLayout(sentinels=1018).rows == config.vocab_rows


@pytest.fixture(scope="module")
def fresh():
    return split(Decoder(dataclasses.replace(TINY, width=64, vocab_rows=1024), rngs=nnx.Rngs(0)))


def test_fresh_weights_are_truncated_and_output_layers_zero(fresh):
    definition, params = fresh
    for path, array in params.items():
        if path in ("layers/attn/out_proj/weight", "layers/mlp/c_proj/weight"):
            assert not array.any()
        elif path == "wpe/weight":
            assert float(array.std()) == pytest.approx(0.0002, rel=0.1)
        else:
            assert float(jnp.abs(array).max()) <= 0.006 * 3
            # Cut at three standard deviations, a normal distribution has 0.9866 of its own.
            assert float(array.std()) == pytest.approx(0.006 * 0.9866, rel=0.05)
    # Every block returns its input: only embeddings and the last norm remain.
    model = merge(definition, params)
    tokens = jnp.arange(10)[None]
    got = model(model.embed(tokens))
    x = got.inputs - got.inputs.mean(-1, keepdims=True)
    np.testing.assert_allclose(got.hidden, x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5), atol=1e-5)


@pytest.fixture(scope="module")
def opt(golden, tmp_path_factory):
    """The golden model, read from its PyTorch file, and its arrays."""
    path = tmp_path_factory.mktemp("opt") / "opt.pt"
    path.write_bytes(lzma.decompress((golden / "cm3leon/opt_nobias_tiny.pt.xz").read_bytes()))
    with open_tensors(path) as weights:
        theirs = {key: tensor.read() for key, tensor in weights.tensors.items()}
        sizes = weights.others["config"]
    config = CM3LeonConfig(
        layers=sizes["L"],
        width=sizes["d"],
        heads=sizes["h"],
        feed_forward=sizes["ff"],
        vocab_rows=sizes["vocab"],
        vocabulary=VOCABULARY,
        context_length=sizes["positions"],
        activation=sizes["act"],
    )
    definition, shapes, _ = abstract(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    planned = to_ours(cm3leon_table(layout_of(theirs)), theirs, shapes)
    params = {name: jnp.asarray(tensor.read()) for name, tensor in planned.items()}
    return merge(definition, params), params, theirs, np.load(golden / "cm3leon/opt_nobias_tiny.npz")


def test_the_forward_pass_equals_transformers(opt):
    model, _, _, expected = opt
    tokens = jnp.asarray(expected["tokens"])
    got = model(model.embed(tokens), collect=("out",))
    np.testing.assert_allclose(got.collected["out"][0], expected["hidden_mid"], atol=2e-5)
    np.testing.assert_allclose(got.inputs, expected["hidden_first"], atol=2e-5)
    np.testing.assert_allclose(got.hidden, expected["hidden_last"], atol=2e-5)
    logits = model.logits(got.hidden)
    np.testing.assert_allclose(logits, expected["logits"], atol=5e-5)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, expected["next_token_logprob"], atol=5e-5)


def test_cached_decoding_equals_the_full_forward_pass(opt):
    model, _, _, expected = opt
    tokens = jnp.asarray(expected["tokens"])
    definition, params = split(model)

    @jax.jit
    def decode(params, tokens):
        model = merge(definition, params)

        def step(cache, inputs):
            token, place = inputs
            got = model(model.embed(token[:, None]), positions=jnp.full((len(token), 1), place), cache=cache)
            return got.cache, got.hidden[:, 0]

        places = jnp.arange(tokens.shape[1])
        return jax.lax.scan(step, model.init_cache(len(tokens), 24), (tokens.T, places))[1]

    np.testing.assert_allclose(decode(params, tokens).swapaxes(0, 1), expected["hidden_last"], atol=2e-5)


@pytest.mark.parametrize("layout", ["opt", "metaseq"])
def test_conversion_and_back_gives_the_same_tensors(opt, layout):
    _, params, theirs, _ = opt
    table = cm3leon_table(layout)
    check_table(table)
    written = {key: tensor.read() for key, tensor in to_theirs(table, params).items()}
    assert layout_of(written) == layout
    if layout == "opt":
        assert written.keys() == theirs.keys()
        for key, array in theirs.items():
            np.testing.assert_array_equal(written[key], array)
    for name, tensor in to_ours(table, written, params).items():
        np.testing.assert_array_equal(tensor.read(), params[name])


def test_files_of_other_models_are_refused(opt):
    _, params, theirs, _ = opt
    with pytest.raises(ValueError, match="neither an OPT-style nor a metaseq-style"):
        layout_of(["transformer.wte.weight"])
    # The norms of an ordinary OPT have weights, which this model must not lose silently.
    with pytest.raises(KeyMapError, match=r"model\.decoder\.final_layer_norm\.weight"):
        to_ours(cm3leon_table(), theirs | {"model.decoder.final_layer_norm.weight": np.ones(32)}, params)
    with pytest.raises(ValueError, match="5 heads do not divide the width 32"):
        dataclasses.replace(TINY, heads=5)
    with pytest.raises(ValueError, match="has 51 ids, more than the 50 vocab_rows; set vocab_rows to 128"):
        dataclasses.replace(TINY, vocab_rows=50)


def test_the_config_is_read_back():
    for config in (TINY, *CM3LEON_SIZES.values()):
        assert from_dict(CM3LeonConfig, json.loads(json.dumps(to_dict(config))), "model") == config

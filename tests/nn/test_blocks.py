"""Masks, attention, rotary positions, stacks and their remat policies, adapters: each against a direct formula."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.models.language.decoder import Decoder
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.nn import fused, masks
from magma_jax.nn.adapters import Adapter, AdapterConfig
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.convolution import BatchNorm
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import AdapterParam, EncoderParam, merge, split, variable_types
from magma_jax.nn.rotary import apply_rotary, rotary_table
from magma_jax.nn.stack import scan
from magma_jax.training.step.cross_entropy import cross_entropy
from magma_jax.typing import IGNORED

CONFIG = GPTJConfig(layers=3, width=32, heads=4, rotary_dim=4, feed_forward=64, vocab_rows=50, head_rows=60)
KINDS = ["normal", "parallel", "scaled_parallel"]


def test_masks_are_those_drawn_in_the_module():
    drawn = [line.split() for line in masks.__doc__.splitlines() if re.fullmatch(r" +([01] ?)+ .*", line)]
    images = np.array(drawn, int).reshape(4, 5, 4).swapaxes(0, 1)  # five masks of four queries and four keys
    segments = jnp.array([[1, 1, 2, 2]])
    rules = [
        Mask("causal"),
        Mask("prefix", prefix=jnp.array([2])),
        Mask("full"),
        Mask("causal", window=2),
        Mask("causal", segments=segments),
    ]
    for mask, image in zip(rules, images, strict=True):
        np.testing.assert_array_equal(mask.dense(4, 4)[0], image)
    # Rows with prefixes of their own, and a single query against a cache of five slots.
    both = Mask("prefix", prefix=jnp.array([0, 5]), queries=jnp.array([[3], [3]])).dense(1, 5)
    np.testing.assert_array_equal(both[:, 0], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="needs the lengths of the prefixes"):
        Mask("prefix")


def test_attention_equals_its_formula():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, 3, 8)).astype(np.float32) for length in (4, 6, 6))
    mask = rng.random((2, 4, 6)) < 0.7
    mask[:, :, 0] = True
    heads_first = (jnp.asarray(k).swapaxes(1, 2), jnp.asarray(v).swapaxes(1, 2))
    out, weights = dot_product_attention(
        jnp.asarray(q), *heads_first, Mask("full", extra=jnp.asarray(mask)), weights=True
    )
    for b, h, s in np.ndindex(2, 3, 4):
        scores = np.exp(k[b, :, h] @ q[b, s, h] / math.sqrt(8)) * mask[b, s]
        expected = scores / scores.sum()
        np.testing.assert_allclose(weights[b, h, s], expected, atol=1e-6)
        np.testing.assert_allclose(out[b, s, h], expected @ v[b, :, h], atol=1e-5)
    assert (np.asarray(weights)[~np.broadcast_to(mask[:, None], weights.shape)] == 0).all()


@pytest.mark.parametrize(
    ("device", "serves", "says"),
    [
        (("gpu", "9.0", "bfloat16", 256), True, "attention by cudnn: heads of 256"),
        (("gpu", "12.0", "float16", 64), True, "compute capability 12.0"),
        (("gpu", "8.0", "bfloat16", 128), True, "attention by cudnn"),
        (("gpu", "8.9", "bfloat16", 256), False, "heads of 256 where compute capability 8.9 takes"),
        (("gpu", "9.0", "bfloat16", 260), False, "multiples of 8 up to 256"),
        (("gpu", "9.0", "float32", 64), False, "not float32"),
        (("gpu", "7.5", "float16", 64), False, "compute capability 7.5 is not supported"),
        (("gpu", "gfx90a", "bfloat16", 64), False, "not an NVIDIA device"),
        (("tpu", "", "bfloat16", 256), False, "splash attention supports"),
        (("cpu", "", "float32", 64), False, "no kernel for cpu"),
    ],
)
def test_where_cudnn_computes_attention(device, serves, says, caplog):
    fused.kernel_for.cache_clear()
    platform, capability, dtype, size = device
    arguments = (platform, capability, dtype, 64, 64, size, ("prefix", "", False, False, False))
    with caplog.at_level("INFO"):
        assert [fused.kernel_for(*arguments) == "cudnn" for _ in range(2)] == [serves, serves]
    (message,) = caplog.messages  # once
    assert says in message


@pytest.mark.parametrize("divisor", [None, 1.0])
def test_what_cudnn_is_asked_for_is_the_same_attention(monkeypatch, divisor):
    """cuDNN itself is not there: JAX's plain implementation answers in its place."""
    plain = jax.nn.dot_product_attention
    asked = []

    def instead(*arrays, implementation, **options):
        asked.append(implementation)
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr("magma_jax.nn.attention.choose_kernel", lambda q, k, mask: "cudnn")
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 3, 2, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 2, 5, 8)), jnp.float32) for _ in range(2))
    places = jnp.array([[0, 1, 2], [2, 3, 4]])
    mask = Mask("causal", queries=places)
    out, _ = dot_product_attention(q, k, v, mask, score_divisor=divisor)
    # Weights are asked for: all scores.
    expected, weights = dot_product_attention(q, k, v, mask, score_divisor=divisor, weights=True)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert weights.shape == (2, 2, 3, 5)
    dot_product_attention(q[:, :1], k, v, Mask("causal", queries=places[:, :1]))  # one query: XLA
    assert asked == ["cudnn"]


def test_a_query_that_sees_nothing_gives_finite_numbers():
    q = jnp.ones((1, 2, 1, 4))
    nothing = Mask("full", extra=jnp.zeros((1, 2, 2), bool))
    out, weights = dot_product_attention(q, q.swapaxes(1, 2), q.swapaxes(1, 2), nothing, weights=True)
    assert jnp.isfinite(out).all()
    assert jnp.isfinite(weights).all()


def test_rotary_turns_interleaved_pairs_as_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 10)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 300, 2046, 2047]])
    turned = np.asarray(apply_rotary(jnp.asarray(x), *rotary_table(jnp.asarray(positions), 6)))
    angles = positions[..., None] / 10_000 ** (np.arange(3) / 3)
    pairs = (x[..., 0:6:2] + 1j * x[..., 1:6:2]) * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(turned[..., 0:6:2], pairs.real, atol=1e-3)
    np.testing.assert_allclose(turned[..., 1:6:2], pairs.imag, atol=1e-3)
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])


def test_rotary_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = [apply_rotary(x, *rotary_table(jnp.array([[at]]), 8)) for x, at in ((q, at_q), (k, at_k))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layernorm", [False, True])
def test_adapters_equal_their_formula(kind, layernorm):
    adapter = Adapter(8, AdapterConfig(kind, 2, layernorm), rngs=nnx.Rngs(0))
    definition, params = split(adapter)
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in params.items()}
    x, y = (rng.normal(size=(2, 3, 8)).astype(np.float32) for _ in range(2))
    p = {path: np.asarray(leaf) for path, leaf in params.items()}

    h = y if kind == "normal" else x
    if layernorm:
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        h = h * p["ln/weight"] + p["ln/bias"]
    h = np.maximum(h @ p["down/weight"].T + p["down/bias"], 0) @ p["up/weight"].T + p["up/bias"]
    expected = y + h * p.get("scale", 1)
    np.testing.assert_allclose(merge(definition, params)(jnp.asarray(x), jnp.asarray(y)), expected, atol=1e-4)


def test_fresh_adapters_are_small_and_clipped():
    """N(0, 1e-3) clipped at two standard deviations, biases too."""
    params = split(Adapter(512, AdapterConfig(downsample_factor=2), rngs=nnx.Rngs(0)))[1]
    for leaf in params.values():
        assert float(jnp.abs(leaf).max()) <= 2e-3 + 1e-9
    weight = params["down/weight"]
    assert float(weight.std()) == pytest.approx(0.96e-3, rel=0.02)
    assert float((jnp.abs(weight) == jnp.abs(weight).max()).mean()) == pytest.approx(0.0455, abs=0.005)
    with pytest.raises(ValueError, match="leaves nothing of width 10"):
        Adapter(10, AdapterConfig(downsample_factor=16), rngs=nnx.Rngs(0))


def test_bottlenecks_are_rounded_down():
    """As in the original: the paper's factors 12 and 6 do not divide 4096."""
    assert split(Adapter(32, AdapterConfig(downsample_factor=12), rngs=nnx.Rngs(0)))[1]["down/weight"].shape == (2, 32)


@pytest.mark.parametrize(("mlp", "attn"), [(kind, None) for kind in KINDS] + [(None, "normal"), ("normal", "parallel")])
def test_removing_adapters_gives_the_language_model_bit_for_bit(mlp, attn):
    adapters = [kind and AdapterConfig(kind, 4, layernorm=True) for kind in (mlp, attn)]
    model = Decoder(CONFIG, mlp_adapter=adapters[0], attn_adapter=adapters[1], rngs=nnx.Rngs(0))
    types = variable_types(model)
    definition, params = split(model)
    params = {p: leaf + 0.1 if types[p] is AdapterParam else leaf for p, leaf in params.items()}
    bare_definition, bare = split(Decoder(CONFIG, rngs=nnx.Rngs(1)))
    bare = {path: params[path] for path in bare}
    ids = jnp.arange(24).reshape(2, 12)

    @jax.jit
    def logits(params, remove):
        model = merge(definition, params)
        if remove is not None:
            model.remove_adapters()
        return model.logits(model(model.embed(ids)).hidden)

    @jax.jit
    def bare_logits(params):
        model = merge(bare_definition, params)
        return model.logits(model(model.embed(ids)).hidden)

    expected = bare_logits(bare)
    np.testing.assert_array_equal(logits(params, ()), expected)
    assert not np.allclose(logits(params, None), expected)


@pytest.fixture(scope="module")
def language_model():
    config = AdapterConfig("scaled_parallel", 4)
    return split(Decoder(CONFIG, mlp_adapter=config, rngs=nnx.Rngs(0)))


def test_a_stack_computes_what_its_layers_compute_one_by_one(language_model):
    definition, params = language_model
    model = merge(definition, params)
    x = jax.random.normal(jax.random.key(0), (2, 7, 32))
    rotary = rotary_table(jnp.broadcast_to(jnp.arange(7), (2, 7)), CONFIG.rotary_dim)
    layer_definition, layers = split(model.layers)
    for i in range(CONFIG.layers):
        layer = merge(layer_definition, {path: leaf[i] for path, leaf in layers.items()})
        x = layer(x, Mask("causal"), rotary, None, weights=False).out
    expected = model.ln_f(x)
    output = model(jax.random.normal(jax.random.key(0), (2, 7, 32)), collect=("out", "attentions"))
    np.testing.assert_allclose(output.hidden, expected, atol=1e-5)
    assert output.collected["attentions"].shape == (3, 2, 4, 7, 7)


def test_layers_of_a_stack_differ_at_birth(language_model):
    weight = language_model[1]["layers/mlp/c_fc/weight"]
    assert weight.shape == (3, 64, 32)
    assert not np.allclose(weight[0], weight[1])


def test_every_remat_policy_gives_the_same_gradients(language_model):
    definition, params = language_model
    x = jax.random.normal(jax.random.key(0), (2, 7, 32))

    def gradients(remat):
        def loss(params):
            return jnp.sum(jnp.square(merge(definition, params)(x, remat=remat).hidden[:, -1]))

        return jax.jit(jax.grad(loss))(params)

    expected = gradients("none")
    assert float(jnp.abs(expected["layers/mlp_adapter/scale"]).max()) > 0
    for remat in ("dots", "full"):
        for path, leaf in gradients(remat).items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5)


def test_a_scan_hands_each_layer_its_input():
    layers = jax.vmap(lambda key: split(Adapter(4, AdapterConfig(downsample_factor=2), rngs=nnx.Rngs(key)))[1])
    definition = split(Adapter(4, AdapterConfig(downsample_factor=2), rngs=nnx.Rngs(0)))[0]
    stacked = merge(definition, layers(jax.random.split(jax.random.key(0), 3)))
    total, seen = scan(
        stacked, lambda layer, total, x: (total + x, 2 * x), jnp.float32(0), jnp.arange(3.0), remat="none"
    )
    assert float(total) == 3
    np.testing.assert_array_equal(seen, [0, 2, 4])


def test_padding_on_the_right_leaves_the_loss_unchanged(language_model):
    """As the original pads: every caption to the whole context."""
    definition, params = language_model
    ids = np.random.default_rng(0).integers(0, 50, (2, 9))
    labels = ids.copy()

    @jax.jit
    def loss(params, ids, labels):
        model = merge(definition, params)
        return cross_entropy(model.logits, model(model.embed(ids[:, :-1])).hidden, labels[:, 1:])

    short = loss(params, ids, labels)
    padding = ((0, 0), (0, 2048 - 9))
    long = loss(params, np.pad(ids, padding, constant_values=3), np.pad(labels, padding, constant_values=IGNORED))
    assert int(short[1]) == int(long[1]) == 16
    np.testing.assert_allclose(long[0], short[0], rtol=1e-6)


def test_batch_norm_is_synchronised_over_devices():
    norm = BatchNorm(4, param=EncoderParam)
    definition, params = split(norm)
    images = jax.random.normal(jax.random.key(0), (16, 3, 3, 4)) * jnp.arange(1, 17)[:, None, None, None]

    @jax.jit
    def run(params, images):
        norm = merge(definition, params)
        return norm(images, "batch"), split(norm)[1]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(images, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    for one, several in zip(jax.tree.leaves(run(params, images)), jax.tree.leaves(run(params, sharded)), strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-5)


def test_more_than_ten_members_of_a_list_keep_their_order():
    class Layers(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Param(jnp.float32(i)) for i in range(12)])

    definition, params = split(Layers())
    assert [float(params[f"layers/{i}"]) for i in range(12)] == list(range(12))
    assert [float(layer[...]) for layer in merge(definition, params).layers] == list(range(12))

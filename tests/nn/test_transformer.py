"""The one transformer, as every architecture that it must express: against transformers' PyTorch, and decoding with a
cache against the whole pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.modules import AdapterParam, EncoderParam, abstract, merge, split, variable_types
from magma_jax.nn.rotary import RotaryConfig
from magma_jax.nn.transformer.block import Block
from magma_jax.nn.transformer.config import BlockConfig, InitConfig, PositionTable, TrunkConfig
from magma_jax.nn.transformer.trunk import Trunk
from tests.nn.transformers_trunks import (
    HEADS,
    LAYERS,
    NAMES,
    NORM_NAMES,
    SIZES,
    TRUNKS,
    WIDTH,
    WINDOW,
    pytorch_trunk,
)

ROWS, LENGTH = 2, 12


def definition_of(config):
    return abstract(lambda: Trunk(config, rngs=nnx.Rngs(0)))


@functools.cache
def random_trunk(name):
    """Definition and parameters large enough for attention to choose."""
    definition, shapes, _ = definition_of(TRUNKS[name])
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        weight = path.endswith("/weight") and "ln_" not in path
        value = rng.standard_normal(shape.shape, np.float32) * (0.3 if weight else 0.1)
        return jnp.asarray(value + ("ln_" in path))

    return definition, {path: leaf(path, shape) for path, shape in shapes.items()}


def inputs():
    return jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, LENGTH, WIDTH), np.float32))


@functools.cache
def runner(name):
    definition, _ = random_trunk(name)
    return jax.jit(lambda params, x: merge(definition, params)(x, collect=("out", "attentions")))


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.filterwarnings("ignore")
def test_trunks_are_those_of_transformers(name):
    """Hidden states behind every layer and the final norm, and attention weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, ours = random_trunk(name)
    theirs = pytorch_trunk(name, transformers).eval()
    copied = set()

    def copy(parameter, path, layer=None):
        value = ours[path] if layer is None else ours[path][layer]
        assert tuple(parameter.shape) == value.shape, path
        parameter.copy_(torch.from_numpy(np.array(value)))
        copied.add(path)

    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            *module, kind = key.removeprefix("decoder.").split(".")
            if module == ["embed_tokens"]:
                continue
            if module == ["embed_positions"]:
                copy(parameter, "wpe/weight")
            elif module in (["norm"], ["final_layer_norm"]):
                copy(parameter, f"ln_f/{kind}")
            else:
                place = (NAMES | NORM_NAMES[name])[".".join(module[2:])]
                copy(parameter, f"layers/{place}/{kind}", int(module[1]))
        assert copied == set(ours)
        x = inputs()
        expected = theirs(
            inputs_embeds=torch.from_numpy(np.array(x)), output_hidden_states=True, output_attentions=True
        )
    found = runner(name)(ours, x)
    wanted = [state.numpy() for state in expected.hidden_states]
    np.testing.assert_allclose(found.inputs, wanted[0], atol=1e-6)
    scale = max(np.abs(state).max() for state in wanted)
    for state, layer in zip(wanted[1:-1], found.collected["out"][:-1], strict=True):
        np.testing.assert_allclose(layer, state, atol=1e-5 * scale)
    np.testing.assert_allclose(found.hidden, wanted[-1], atol=1e-5 * scale)
    for layer, weights in zip(found.collected["attentions"], expected.attentions, strict=True):
        np.testing.assert_allclose(layer, weights.numpy(), atol=2e-5)


def test_a_block_equals_its_formula():
    """The most unusual one, Gemma's, head by head in NumPy."""
    _, trunk = random_trunk("gemma2")
    p = {path.removeprefix("layers/"): np.array(leaf[0], np.float64) for path, leaf in trunk.items()}
    x = np.array(inputs()[0], np.float64)

    def rms(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + p[f"{name}/weight"])

    def turned(x):
        angles = np.arange(LENGTH)[:, None] / 500.0 ** (np.arange(6) / 6)
        pairs = (x[:, :6] + 1j * x[:, 6:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    h, heads = rms("ln_1", x), []
    for head in range(HEADS):
        rows, shared = (slice(12 * number, 12 * number + 12) for number in (head, head // 2))
        q, k = turned(h @ p["attn/q_proj/weight"][rows].T), turned(h @ p["attn/k_proj/weight"][shared].T)
        scores = np.exp(2 * np.tanh(q @ k.T / 3 / 2))
        distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
        scores *= (distance >= 0) & (distance < WINDOW)
        heads.append(scores / scores.sum(1, keepdims=True) @ (h @ p["attn/v_proj/weight"][shared].T))
    y = x + rms("ln_1_out", np.concatenate(heads, axis=1) @ p["attn/out_proj/weight"].T)
    h = rms("ln_2", y)
    gate = h @ p["mlp/c_gate/weight"].T
    gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    expected = y + rms("ln_2_out", (gate * (h @ p["mlp/c_fc/weight"].T)) @ p["mlp/c_proj/weight"].T)
    found = runner("gemma2")(trunk, inputs()).collected["out"][0, 0]  # of the first layer and row
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("name", "unstacked"), [*((name, False) for name in TRUNKS), ("gemma2", True)])
def test_decoding_with_a_cache_is_the_whole_pass(name, unstacked):
    """Two rows of different lengths in one prefill, then token by token, each at its own place."""
    definition, params = random_trunk(name)
    block, lengths, steps = TRUNKS[name].block, np.array([7, 4]), 4

    @jax.jit
    def run(params, x, positions, cache=None):
        model = merge(definition, params)
        if unstacked:
            model.unstack()
        cache = model.init_cache(ROWS, LENGTH) if cache is None else cache
        output = model(x, positions=positions, cache=cache)
        return output.hidden, output.cache

    x = np.asarray(inputs())
    _, cache = run(params, x[:, :7], np.broadcast_to(np.arange(7), (ROWS, 7)))
    assert cache.key[0].shape == (ROWS, block.key_heads, LENGTH, block.size)
    expected = np.asarray(runner(name)(params, x).hidden)
    for step in range(steps):
        positions = lengths + step
        hidden, cache = run(params, x[[0, 1], positions][:, None], positions[:, None], cache)
        np.testing.assert_allclose(hidden[:, 0], expected[[0, 1], positions], atol=2e-4)


def dropout_trunk(**rates):
    block = BlockConfig(**SIZES, **rates)
    return TrunkConfig(block=block, layers=LAYERS, positions=PositionTable(length=LENGTH), final_norm=False)


@pytest.mark.parametrize("place", ["attention_dropout", "residual_dropout"])
def test_dropout_needs_a_key_and_differs_by_layer(place):
    config = dropout_trunk(**{place: 0.5})
    definition, params = split(Trunk(config, rngs=nnx.Rngs(0)))
    plain = definition_of(dropout_trunk())[0]
    x = inputs()

    @functools.partial(jax.jit, static_argnames=("dropping",))
    def run(params, key=None, dropping=True):
        model = merge(definition if dropping else plain, params)
        return model(x, dropout_key=key, collect=("attn",))

    expected = run(params, dropping=False).hidden
    np.testing.assert_array_equal(run(params).hidden, expected)
    one, again, other = (run(params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.hidden, again.hidden)
    assert not np.allclose(one.hidden, expected)
    assert not np.allclose(one.hidden, other.hidden)
    if place == "residual_dropout":
        dropped = np.asarray(one.collected["attn"]) == 0
        assert dropped.mean() == pytest.approx(0.5, abs=0.05)
        assert (dropped[0] != dropped[1]).any()


def test_dropout_is_recomputed_alike_under_remat():
    config = dropout_trunk(attention_dropout=0.3, residual_dropout=0.3)
    definition, params = split(Trunk(config, rngs=nnx.Rngs(0)))

    def gradients(remat):
        def loss(params):
            return jnp.square(
                merge(definition, params)(inputs(), dropout_key=jax.random.key(0), remat=remat).hidden
            ).sum()

        return jax.jit(jax.grad(loss))(params)

    expected, found = gradients("none"), gradients("full")
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=1e-4)


def test_fresh_weights_by_place():
    init = InitConfig(std=0.006, truncate=3.0, zero_outputs=True)
    config = dataclasses.replace(TRUNKS["opt"].block, init=init)
    positions = PositionTable(length=400, offset=2, std=0.0002)
    trunk = TrunkConfig(block=config, layers=LAYERS, positions=positions, final_norm=False)
    definition, params = split(Trunk(trunk, rngs=nnx.Rngs(0)))
    assert {path for path, leaf in params.items() if not leaf.any()} == {
        "layers/attn/out_proj/weight",
        "layers/mlp/c_proj/weight",
    }
    weight = params["layers/mlp/c_fc/weight"]
    assert float(weight.std()) == pytest.approx(0.006 * 0.9866, rel=0.05)
    assert float(jnp.abs(weight).max()) <= 3 * 0.006
    assert params["wpe/weight"].shape == (402, WIDTH)
    assert float(params["wpe/weight"].std()) == pytest.approx(0.0002, rel=0.05)
    # Output layers at zero: every block returns its input.
    output = merge(definition, params)(inputs())
    np.testing.assert_array_equal(output.hidden, output.inputs)


def test_a_block_of_another_part_has_that_parts_variables_and_adapters_their_own():
    adapter = AdapterConfig(downsample_factor=4)
    config = BlockConfig(**SIZES, param=EncoderParam, mlp_adapter=adapter, attn_adapter=adapter, activation="geglu")
    types = variable_types(Block(config, rngs=nnx.Rngs(0)))
    assert {kind for path, kind in types.items() if "_adapter/" in path} == {AdapterParam}
    assert {kind for path, kind in types.items() if "_adapter/" not in path} == {EncoderParam}
    assert "mlp/c_gate/bias" in types


def test_joint_projections_hold_the_heads_of_separate_ones():
    """Shared heads of keys and values too, where queries, keys and values lie below each other."""
    separate = BlockConfig(**SIZES, kv_heads=2, rotary=RotaryConfig(features=4))
    definition, params = split(Block(separate, rngs=nnx.Rngs(0)))
    joint = abstract(lambda: Block(dataclasses.replace(separate, projections="joint"), rngs=nnx.Rngs(0)))[0]
    together = dict(params)
    for kind in ("weight", "bias"):
        parts = [together.pop(f"attn/{name}_proj/{kind}") for name in ("q", "k", "v")]
        together[f"attn/qkv_proj/{kind}"] = jnp.concatenate(parts)
    x, rotary = inputs(), separate.rotary.table(jnp.zeros((ROWS, LENGTH), jnp.int32))
    heads_of = jax.jit(lambda params, definition: merge(definition, params).attn.heads_of(x, rotary), static_argnums=1)
    for found, wanted in zip(heads_of(together, joint), heads_of(params, definition), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "5 heads do not divide the width 32; give head_size"),
        ({"kv_heads": 3}, "3 kv_heads do not divide 4 heads"),
        ({"kv_heads": 2, "projections": "joint_by_head"}, "joint_by_head need kv_heads 4, not 2"),
        ({"rotary": RotaryConfig(features=10)}, "10 rotary features do not fit in a head of 8"),
        ({"dtype": "float31"}, "block: dtype .*float31.* is none of"),
    ],
)
def test_blocks_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BlockConfig(**(SIZES | changes))


def test_trunks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="2 windows for 3 layers"):
        TrunkConfig(block=BlockConfig(**SIZES), layers=3, windows=(1, None))
    with pytest.raises(ValueError, match="features are turned in pairs, got 3"):
        RotaryConfig(features=3)
    trunk = Trunk(TRUNKS["opt"], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="33 positions exceed the context of 32"):
        trunk(jnp.zeros((1, 33, WIDTH)))

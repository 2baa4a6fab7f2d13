"""Every kernel against the plain form, values and gradients, for every kind of mask."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.nn import fused
from magma_jax.nn.blockwise import blockwise_attention
from magma_jax.nn.fused import fused_attention
from magma_jax.nn.masks import MASKED_SCORE, Mask
from magma_jax.runtime.sharding import MeshConfig, batch_sharding, make_mesh, on_mesh, traced_for

BATCH, LENGTH, HEADS, GROUPS, SIZE = 2, 37, 4, 2, 8
SEGMENTS = jnp.array([[1] * 10 + [2] * 20 + [0] * 7, [1] * 30 + [2] * 7])
MASKS = {
    "causal": Mask("causal"),
    "full": Mask("full"),
    "prefix": Mask("prefix", prefix=jnp.array([5, 20])),
    "lengths": Mask("full", lengths=jnp.array([37, 11])),
    "causal lengths": Mask("causal", lengths=jnp.array([37, 11])),
    "segments": Mask("causal", segments=SEGMENTS),
    "full segments": Mask("full", segments=SEGMENTS),
    "window": Mask("causal", window=6),
    "full window": Mask("full", window=6),
    "traced window": Mask("causal", window=jnp.int32(6)),
    "extra": Mask(
        "full", extra=jnp.asarray(np.random.default_rng(1).random((1, LENGTH, LENGTH)) < 0.5).at[0, :, 0].set(True)
    ),
}
BY_SPLASH = {name for name, mask in MASKS.items() if mask.extra is None and mask.kind != "prefix"} - {"traced window"}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    q = jnp.float32(rng.normal(size=(BATCH, LENGTH, HEADS, SIZE)))
    k, v = (jnp.float32(rng.normal(size=(BATCH, GROUPS, LENGTH, SIZE))) for _ in range(2))
    return q, k, v


def plain(q, k, v, mask, scale=1 / math.sqrt(SIZE)):
    k, v = (jnp.repeat(x, HEADS // GROUPS, axis=1) for x in (k, v))
    scores = jnp.einsum("bshk,bhtk->bhst", q, k) * scale
    scores = jnp.where(mask.dense(q.shape[1], k.shape[2])[:, None], scores, MASKED_SCORE)
    return jnp.einsum("bhst,bhtk->bshk", jax.nn.softmax(scores), v)


def value_and_gradients(attention, arrays, mask):
    weights = jnp.cos(jnp.arange(SIZE))

    def total(q, k, v):
        out = attention(q, k, v, mask)
        return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, *gradients


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [8, 37, 64])
def test_blocks_of_keys_give_what_the_whole_gives(arrays, name, block):
    expected = value_and_gradients(plain, arrays, MASKS[name])
    attention = functools.partial(blockwise_attention, scale=1 / math.sqrt(SIZE), block=block)
    for found, wanted in zip(value_and_gradients(attention, arrays, MASKS[name]), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("name", sorted(BY_SPLASH))
def test_splash_attention_gives_what_the_whole_gives(arrays, name):
    """In Pallas' interpreter, since no TPU is here."""
    attention = functools.partial(fused.splash_attention, scale=1 / math.sqrt(SIZE), interpret=True)
    expected = value_and_gradients(plain, arrays, MASKS[name])
    for found, wanted in zip(value_and_gradients(attention, arrays, MASKS[name]), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("name", ["causal", "segments", "lengths"])
def test_on_a_mesh_each_device_runs_the_kernel_on_its_rows_and_heads(arrays, name):
    mesh = make_mesh(MeshConfig(data=2, model=2), jax.devices()[:4])
    attention = functools.partial(fused.splash_attention, scale=1 / math.sqrt(SIZE), interpret=True)
    on_devices = jax.jit(on_mesh(lambda q, k, v: attention(q, k, v, MASKS[name]), mesh))
    placed = jax.device_put(arrays, batch_sharding(mesh))
    np.testing.assert_allclose(on_devices(*placed), plain(*arrays, MASKS[name]), atol=2e-5)


def test_queries_that_stand_elsewhere_see_as_far_as_their_place(arrays):
    q, k, v = arrays
    places = jnp.array([[3, 4, 5], [20, 21, 36]])
    whole = plain(q, k, v, Mask("causal"))
    taken = jnp.take_along_axis(q, places[:, :, None, None], axis=1)
    found = blockwise_attention(taken, k, v, Mask("causal", queries=places), scale=1 / math.sqrt(SIZE), block=8)
    np.testing.assert_allclose(found, jnp.take_along_axis(whole, places[:, :, None, None], axis=1), atol=2e-5)


@pytest.mark.parametrize(
    ("platform", "name", "expected", "reason"),
    [
        ("tpu", "causal", "splash", "37 x 37 positions, heads of 8 in float32"),
        ("tpu", "segments", "splash", "37 x 37 positions"),
        ("tpu", "traced window", "blockwise", "splash attention supports only causal, full"),
        ("tpu", "prefix", "blockwise", "splash attention supports only causal, full"),
        ("cpu", "causal", "blockwise", "no kernel for cpu"),
    ],
)
def test_the_choice_and_its_reason_are_logged_once(arrays, caplog, platform, name, expected, reason):
    fused.kernel_for.cache_clear()
    with traced_for(platform), caplog.at_level("INFO"):
        for _ in range(2):
            assert fused.choose_kernel(arrays[0], arrays[1], MASKS[name]) == expected
    (message,) = caplog.messages
    assert message.startswith(f"attention by {expected}: ")
    assert reason in message


@pytest.mark.parametrize("name", ["causal", "full", "lengths", "window", "segments"])
def test_what_is_asked_of_cudnn_is_well_formed(monkeypatch, name):
    """Lowered for CUDA without a GPU, forward and backward; cuDNN is not there to say what it thinks of it."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 64, 4, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=(2, 4, 64, 64)), jnp.bfloat16) for _ in range(2))
    segments = jnp.array([[1] * 40 + [2] * 24] * 2)
    mask = {**MASKS, "segments": Mask("causal", segments=segments)}[name]

    def total(q, k, v):
        return fused_attention(q, k, v, mask, scale=0.125, kernel="cudnn").sum()

    lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",))
    calls = re.findall(r"__cudnn\$fmha\w*", lowered.as_text())
    assert any("Backward" in call for call in calls)
    assert len(set(calls)) == 2


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(length):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, length, 2, 16), *[(1, 2, length, 16)] * 2]]
        total = lambda q, k, v: blockwise_attention(q, k, v, Mask("causal"), scale=0.25, block=128).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)

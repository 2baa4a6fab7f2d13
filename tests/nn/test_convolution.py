"""The forms of convolutions and products that a CPU is given compute what the plain ones compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.nn import cpu
from magma_jax.nn.convolution import conv2d
from magma_jax.nn.layers import product

# kernel, stride, padding, height, width: those of the encoders, and sides that the stride does not divide.
CASES = [(3, 1, 1, 7, 7), (3, 2, 1, 8, 9), (7, 2, 3, 9, 12), (2, 2, 0, 5, 4), (1, 2, 0, 7, 6), (1, 1, 0, 3, 4)]


@pytest.mark.parametrize(("kernel", "stride", "padding", "height", "width"), CASES)
def test_values_and_gradients_are_equal(monkeypatch, kernel, stride, padding, height, width):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, height, width, 3), np.float32))
    weight = jnp.asarray(rng.standard_normal((4, 3, kernel, kernel), np.float32))
    shape = jax.eval_shape(lambda: conv2d(x, weight, stride, padding)).shape
    dy = jnp.asarray(rng.standard_normal(shape, np.float32))

    def run():
        y, gradients = jax.vjp(lambda x, weight: conv2d(x, weight, stride, padding), x, weight)
        return y, *gradients(dy)

    tuned = jax.jit(run)()
    monkeypatch.setattr(cpu, "TUNED", False)
    plain = jax.jit(lambda: run())()
    for found, expected in zip(tuned, plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "tuned", "operation"),
    [("cpu", True, "dot_general"), ("tpu", True, "convolution"), ("cpu", False, "convolution")],
)
def test_platform_and_switch_choose_the_form_forward_and_backward(monkeypatch, platform, tuned, operation):
    monkeypatch.setattr(cpu, "TUNED", tuned)
    x, weight = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32"), jax.ShapeDtypeStruct((4, 3, 3, 3), "float32")
    gradient = jax.value_and_grad(lambda x, weight: (conv2d(x, weight, 1, 1) ** 2).sum(), argnums=(0, 1))
    text = jax.jit(gradient).trace(x, weight).lower(lowering_platforms=(platform,)).as_text()
    found = {name for name in ("dot_general", "convolution") if f"stablehlo.{name}" in text}
    assert found == {operation}


def test_few_rows_have_the_weight_on_the_left_on_a_cpu_alone(monkeypatch):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 4, 16), np.float32))
    weight = jnp.asarray(rng.standard_normal((24, 16), np.float32))
    tuned = jax.jit(lambda x, weight: product(x, weight))(x, weight)
    lowered = {
        platform: jax.jit(lambda x, weight: product(x, weight)).trace(x, weight).lower(lowering_platforms=(platform,))
        for platform in ("cpu", "tpu")
    }
    assert ["optimization_barrier" in text.as_text() for text in lowered.values()] == [True, False]
    monkeypatch.setattr(cpu, "TUNED", False)
    plain = jax.jit(lambda x, weight: product(x, weight)).trace(x, weight)
    assert "platform_index" not in str(plain.jaxpr)
    np.testing.assert_allclose(plain.lower().compile()(x, weight), tuned, rtol=1e-5, atol=1e-5)

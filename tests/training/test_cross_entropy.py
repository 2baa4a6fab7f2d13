"""Cross-entropy in stretches equals the plain form, and no program holds the logits of a whole batch."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magma_jax.runtime.sharding import MeshConfig, make_mesh
from magma_jax.training.step.cross_entropy import cross_entropy, cross_entropy_of_each
from magma_jax.typing import IGNORED

B, S, D, V = 4, 13, 8, 50


def problem(rows=B, length=S, vocabulary=V):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, length, D)).astype(np.float32)
    # Every row has another number of labels, the last has none.
    counted = np.arange(length) < (np.arange(rows)[::-1, None] * length // (rows - 1))
    labels = np.where(counted, rng.integers(0, vocabulary, (rows, length)), IGNORED).astype(np.int32)
    weight, bias = rng.normal(size=(vocabulary, D)), rng.normal(size=vocabulary)
    return tuple(jnp.asarray(array) for array in (hidden, labels, np.float32(weight), np.float32(bias)))


def plain(hidden, labels, weight, bias):
    logits = hidden @ weight.T + bias
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(labels == IGNORED, 0, losses).sum()


def in_stretches(hidden, labels, weight, bias, positions):
    """``positions`` of each row at a time, on however many devices."""
    mesh = jax.typeof(hidden).sharding.mesh
    logit_bytes = positions * hidden.shape[0] * weight.shape[0] * 4 // (mesh.size or 1)
    return cross_entropy(lambda h: h @ weight.T + bias, hidden, labels, logit_bytes=logit_bytes)


@pytest.mark.parametrize("positions", [1, 5, 100])
def test_losses_of_labels_are_those_of_the_plain_form(positions):
    hidden, labels, weight, bias = problem()
    logit_bytes = positions * B * V * 4

    def loss(function, hidden, weight):
        loss, *others = function(lambda h: h @ weight.T + bias, hidden, labels, logit_bytes=logit_bytes)
        return loss, others

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, function), (0, 1), has_aux=True))(hidden, weight)
        for function in (cross_entropy, cross_entropy_of_each)
    ]
    (_, (*_, losses)), _ = results[1]
    expected = optax.softmax_cross_entropy_with_integer_labels(hidden @ weight.T + bias, jnp.maximum(labels, 0))
    np.testing.assert_allclose(losses, jnp.where(labels == IGNORED, 0, expected), atol=1e-5)
    np.testing.assert_allclose(loss(cross_entropy_of_each, hidden, weight)[1][-1], losses, atol=1e-5)
    # Everything else is that of ``cross_entropy``.
    ((value, _), gradients), ((other, _), other_gradients) = results
    np.testing.assert_allclose(value, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, other_gradients)
    # The losses of labels have no derivative.
    gradient = jax.grad(lambda h: loss(cross_entropy_of_each, h, weight)[1][-1].sum())(hidden)
    assert not gradient.any()


@pytest.mark.parametrize("positions", [1, 5, 100])
def test_loss_and_gradients_are_those_of_the_plain_form(positions):
    hidden, labels, weight, bias = problem()
    # Scaled, because the gradient of a sum alone would not show a wrong cotangent.
    expected, gradients = jax.value_and_grad(lambda *p: 3 * plain(p[0], labels, *p[1:]), (0, 1, 2))(
        hidden, weight, bias
    )

    @jax.jit
    def loss(*params):
        return 3 * in_stretches(params[0], labels, *params[1:], positions)[0]

    value, ours = jax.value_and_grad(loss, (0, 1, 2))(hidden, weight, bias)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for mine, reference in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)
    np.testing.assert_allclose(loss(hidden, weight, bias), expected, rtol=1e-6)


def test_counts_and_predicted_labels_come_with_the_loss():
    hidden, labels, weight, bias = problem()
    _, count, predicted = in_stretches(hidden, labels, weight, bias, 4)
    assert count == (labels != IGNORED).sum()
    assert predicted == ((hidden @ weight.T + bias).argmax(-1) == labels).sum()


def test_rows_without_labels_give_zero_and_no_gradient():
    hidden, labels, weight, bias = problem()
    value, gradient = jax.value_and_grad(lambda h: in_stretches(h, jnp.full_like(labels, IGNORED), weight, bias, 4)[0])(
        hidden
    )
    assert value == 0
    assert not gradient.any()


def test_a_frozen_head_gets_no_gradient():
    """Its gradient, of the head's own shape, would come out of the loop."""
    hidden, labels, weight, bias = problem()

    def results(*which):
        gradient = jax.grad(lambda *p: in_stretches(p[0], labels, *p[1:], 4)[0], which)
        jaxpr = jax.make_jaxpr(gradient)(hidden, weight, bias)
        loop = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
        return {variable.aval.shape for variable in loop.outvars}

    assert {(V, D), (V,)} <= results(0, 1, 2)
    assert {(V, D), (V,)}.isdisjoint(results(0))


@pytest.mark.parametrize("learned", [False, True], ids=["frozen head", "trained head"])
def test_no_device_holds_more_logits_than_one_stretch(learned):
    rows, length, vocabulary, positions = 16, 24, 512, 3
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    hidden, labels, weight, bias = problem(rows, length, vocabulary)
    specs = [P(("data", "fsdp")), P(("data", "fsdp")), P("model", "fsdp"), P("model")]
    arguments = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip((hidden, labels, weight, bias), specs, strict=True)
    ]
    which = (0, 2, 3) if learned else (0,)
    function = jax.jit(jax.value_and_grad(lambda *a: in_stretches(*a, positions)[0], which))
    compiled = function.lower(*arguments).compile()
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())]
    # Of the whole batch a device would hold 4 rows x 24 positions x 256 entries.
    assert max(math.prod(shape) for shape in shapes) <= max(4 * positions * vocabulary // 2, rows * length * D)
    for mine, reference in zip(
        jax.tree.leaves(compiled(*arguments)),
        jax.tree.leaves(jax.value_and_grad(plain, which)(hidden, labels, weight, bias)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [5, 100])
def test_label_smoothing_is_that_of_smoothed_targets(positions):
    hidden, labels, weight, bias = problem()

    def smoothed(hidden, weight, bias):
        targets = optax.smooth_labels(jax.nn.one_hot(jnp.maximum(labels, 0), V), 0.1)
        losses = optax.softmax_cross_entropy(hidden @ weight.T + bias, targets)
        return jnp.where(labels == IGNORED, 0, losses).sum()

    def ours(hidden, weight, bias):
        limit = positions * B * V * 4
        return cross_entropy(lambda h: h @ weight.T + bias, hidden, labels, label_smoothing=0.1, logit_bytes=limit)[0]

    expected, gradients = jax.value_and_grad(smoothed, (0, 1, 2))(hidden, weight, bias)
    value, found = jax.value_and_grad(ours, (0, 1, 2))(hidden, weight, bias)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for mine, reference in zip(found, gradients, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)

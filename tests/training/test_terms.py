"""Losses of several terms: their counts differ, and parts of a batch give the step of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from magma_jax.nn.layers import Linear
from magma_jax.nn.modules import LanguageParam, merge, split
from magma_jax.training.step.flops import matmul_flops
from magma_jax.training.step.terms import Term, learned_counts, objective, term_means
from magma_jax.training.step.train_step import init_state, make_train_step


def _terms(*values):
    return {name: Term(jnp.float32(total), jnp.int32(count), weight) for name, total, count, weight in values}


def test_the_loss_is_the_weighted_sum_of_means():
    terms = _terms(("image", 6.0, 3, 1.0), ("text", 8.0, 2, 0.5), ("length", 5.0, 0, 2.0), ("accuracy", 1.0, 2, 0.0))
    means = term_means(terms)
    assert {name: float(mean) for name, mean in means.items()} == {
        "image": 2.0, "text": 4.0, "length": 5.0, "accuracy": 0.5, "loss": 2.0 + 0.5 * 4.0 + 2.0 * 5.0,
    }  # fmt: skip
    counts = learned_counts(terms)
    assert list(counts) == ["image", "length", "text"]
    assert float(objective(terms, counts)) / 3 == pytest.approx(float(means["loss"]))


def test_a_loss_of_one_term_is_differentiated_as_it_is():
    terms = _terms(("loss", 0.1, 3, 1.0), ("accuracy", 2.0, 3, 0.0))
    assert objective(terms, learned_counts(terms)) is terms["loss"].total


class _Model(nnx.Module):
    def __init__(self, rngs):
        self.first = Linear(4, 8, param=LanguageParam, rngs=rngs)
        self.second = Linear(8, 3, param=LanguageParam, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def _loss(model, batch, key):
    """Two terms that count different rows, one of them drawn by the key."""
    out = model(batch["x"])
    drawn = jax.random.bernoulli(key, 0.5, batch["labels"].shape)
    tokens, lengths = jnp.square(out).sum(-1), jnp.abs(out).sum(-1)
    labelled = batch["labels"] >= 0
    return {
        "tokens": Term(jnp.where(labelled, tokens, 0).sum(), labelled.sum()),
        "length": Term(jnp.where(drawn & labelled, lengths, 0).sum(), (drawn & labelled).sum(), weight=0.5),
        "seen": Term(out.sum(), jnp.int32(out.size), weight=0.0),
    }


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    batch = {"x": jnp.float32(rng.normal(size=(12, 4))), "labels": jnp.asarray(rng.integers(-1, 3, 12))}
    return *split(_Model(nnx.Rngs(0))), batch


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(problem, parts):
    graphdef, params, batch = problem
    root = jax.random.key(3)
    keep = optax.GradientTransformation(lambda p: p, lambda updates, state, params=None: (updates, updates))
    state = init_state(params, {}, keep)
    step = jax.jit(make_train_step(graphdef, _loss, keep, accumulate=parts))
    after, metrics = step(state, {}, batch, root)

    keys = jax.random.split(jax.random.fold_in(root, 0), parts)

    def whole(params):
        terms = [
            _loss(merge(graphdef, params), jax.tree.map(lambda x, i=i: x[i::parts], batch), keys[i])
            for i in range(parts)
        ]
        return term_means(jax.tree.map(lambda *values: sum(values), *terms))["loss"]

    loss, gradient = jax.value_and_grad(whole)(params)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    for path, expected in gradient.items():
        np.testing.assert_allclose(after.opt_state[path], expected, rtol=1e-5, atol=1e-6)


def test_counting_the_parts_runs_no_forward_pass(problem):
    """A second term adds nothing but the count of its labels to the program of an accumulated step."""
    graphdef, params, batch = problem

    def flops(loss):
        optimizer = optax.sgd(0.1)
        step = make_train_step(graphdef, loss, optimizer, accumulate=3)
        arguments = init_state(params, {}, optimizer), {}, batch, jax.random.key(0)
        compiled = jax.jit(step).lower(*arguments).compile()
        return compiled.cost_analysis()["flops"], matmul_flops(jax.make_jaxpr(step)(*arguments).jaxpr)

    def one_term(model, batch, key):
        terms = _loss(model, batch, key)
        merged = terms["tokens"].total + terms["length"].total
        return {"loss": Term(merged, terms["tokens"].count)}

    several, one = flops(_loss), flops(one_term)
    forward = 2 * 4 * (4 * 8 + 8 * 3)  # of the four rows of a part
    assert several[1] >= one[1]
    assert several[0] - one[0] < forward

"""The decode loop on token level; the golden tests show that it gives the original's tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax import Magma
from magma_jax.data.tokenizers.byte_level import gpt2_tokenizer
from magma_jax.families.magma.loading import layers_apart
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.decode import generate
from magma_jax.inference.decoding.sampling import row_keys, sampling_rows
from magma_jax.inference.prompts import PromptBatch
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import merge, split
from tests import tiny

STEPS = 8
LENGTHS = (3, 11, 1, 7)
GREEDY, DRAWN = SamplingConfig(), SamplingConfig(temperature=1.5, top_k=50, top_p=0.9)


@pytest.fixture(scope="module")
def model():
    definition, params = split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))
    # Random weights answer with one token only; larger ones do not.
    return definition, {path: 4 * leaf if leaf.ndim > 1 else leaf for path, leaf in params.items()}


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(length, 32)).astype(np.float32) for length in LENGTHS]


@pytest.fixture(scope="module")
def run(model):
    """Prompts, one seed each, a config and two ends to (tokens, lengths, logits, cache)."""
    definition, params = model

    def one(embeddings, lengths, keys, ends, sampling):
        options = {"max_new_tokens": STEPS, "ends": ends, "return_logits": True}
        options["sampling"] = sampling_rows([sampling] * len(lengths))
        return generate(merge(definition, params).lm, embeddings, lengths, keys, **options)

    jitted = jax.jit(one, static_argnums=4)

    def call(rows, seeds, sampling=GREEDY, ends=(-1, -1), garbage=0.0, width=11):
        padded = np.full((len(rows), width, 32), garbage, np.float32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        return jitted(padded, np.array([len(row) for row in rows], np.int32), keys, ends, sampling)

    return call


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "sampled"])
def test_a_row_gives_what_it_gives_alone(run, prompts, sampling):
    together = run(prompts, range(4), sampling)
    assert len({tuple(row) for row in np.asarray(together.tokens).tolist()}) == 4
    for i, prompt in enumerate(prompts):
        alone = run([prompt], [i], sampling)
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
        np.testing.assert_allclose(together.logits[i], alone.logits[0], atol=1e-3)


def test_neighbours_order_and_padding_change_nothing(run, prompts):
    first = run(prompts, range(4), DRAWN)
    turned = run(prompts[::-1], range(3, -1, -1), DRAWN, garbage=1e3)
    np.testing.assert_array_equal(turned.tokens[::-1], first.tokens)
    other_seed = run(prompts, [0, 1, 2, 99], DRAWN)
    np.testing.assert_array_equal(other_seed.tokens[:3], first.tokens[:3])
    assert (other_seed.tokens[3] != first.tokens[3]).any()


def test_every_logit_is_that_of_the_whole_sequence_without_a_cache(model, run, prompts):
    definition, params = model
    result = run(prompts, range(4))
    module = merge(definition, params)
    for i, prompt in enumerate(prompts):
        words = module.embed_tokens(result.tokens[i : i + 1])
        sequence = jnp.concatenate([prompt[None], words], axis=1)
        hidden = module(sequence).hidden[:, len(prompt) - 1 : -1]
        np.testing.assert_allclose(module.logits(hidden)[0], result.logits[i], atol=1e-3)


def test_each_row_stops_at_its_own_end(run, prompts):
    free = np.asarray(run(prompts, range(4)).tokens)
    ends = int(free[1, 2]), int(free[3, 4])
    ended = run(prompts, range(4), ends=ends)
    for row, tokens in enumerate(free):
        at = next((at for at, token in enumerate(tokens) if token in ends), STEPS)
        assert int(ended.lengths[row]) == at
        np.testing.assert_array_equal(ended.tokens[row], [*tokens[: at + 1], *[ends[0]] * (STEPS - at - 1)])
    assert int(ended.lengths[1]) <= 2
    assert int(ended.lengths[3]) <= 4


def test_the_loop_ends_with_the_last_row(run, prompts):
    eos = int(run(prompts[:1], [0]).tokens[0, 0])
    ended = run(prompts[:1], [0], ends=(-1, eos))
    assert int(ended.lengths[0]) == 0
    # Nothing was computed behind the end.
    assert not np.asarray(ended.logits)[0, 1:].any()
    assert not np.asarray(ended.cache.key)[:, 0, :, 11:].any()


def test_rows_of_the_head_without_an_embedding_are_never_sampled(model, prompts):
    definition, params = model
    rows = tiny.MODEL.lm.vocab_rows
    biased = params | {"lm/lm_head/bias": params["lm/lm_head/bias"].at[rows:].set(1e4)}
    options = {"max_new_tokens": STEPS, "ends": ()}
    for sampling in (GREEDY, DRAWN):

        @jax.jit
        def one(params, embeddings, sampling=sampling_rows([sampling])):
            keys = row_keys(jax.random.key(0), 1)
            lengths = jnp.array([embeddings.shape[1]])
            return generate(merge(definition, params).lm, embeddings, lengths, keys, sampling=sampling, **options)

        result = one(biased, prompts[0][None])
        assert int(result.tokens.max()) < rows
        np.testing.assert_array_equal(result.tokens, one(params, prompts[0][None]).tokens)
        assert int(result.lengths[0]) == STEPS


def test_rows_of_one_batch_may_ask_for_different_things(model, prompts):
    definition, params = model
    configs = [
        SamplingConfig(),
        SamplingConfig(temperature=1.5),
        SamplingConfig(temperature=1.0, top_k=3, min_p=0.05),
        SamplingConfig(temperature=0.8, top_p=0.5, repetition_penalty=1.3),
    ]
    compiled = []

    @jax.jit
    def one(embeddings, lengths, keys, sampling, limit):
        compiled.append(embeddings.shape)
        seen = jnp.zeros((len(lengths), tiny.MODEL.lm.head_rows), bool)
        options = {"max_new_tokens": STEPS, "ends": (-1,), "limit": limit, "seen": seen}
        return generate(merge(definition, params).lm, embeddings, lengths, keys, sampling=sampling, **options)

    def call(rows, seeds, configs, limits):
        padded = np.zeros((len(rows), 11, 32), np.float32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        lengths = np.array([len(row) for row in rows], np.int32)
        return one(padded, lengths, keys, sampling_rows(configs), np.array(limits, np.int32))

    together = call(prompts, range(4), configs, [8, 3, 8, 5])
    np.testing.assert_array_equal(together.lengths, [8, 3, 8, 5])
    for i, prompt in enumerate(prompts):
        alone = call([prompt], [i], configs[i : i + 1], [8])
        wanted = int(together.lengths[i])
        np.testing.assert_array_equal(together.tokens[i, :wanted], alone.tokens[0, :wanted])
        assert (together.tokens[i, wanted:] == -1).all()
    # Other numbers are no other program.
    call(prompts, range(4), configs[::-1], [1, 2, 3, 4])
    assert len(compiled) == 2


def test_logprobs_are_those_of_the_model_whatever_the_sampling(run, prompts):
    result = run(prompts, range(4), DRAWN)
    table = tiny.MODEL.lm.vocab_rows
    expected = jax.nn.log_softmax(result.logits[..., :table], axis=-1)
    expected = np.take_along_axis(np.asarray(expected), np.asarray(result.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_layers_that_are_apart_give_the_same(model, prompts, steps):
    _, params = model
    rows = PromptBatch(jnp.asarray(prompts[1][None]).repeat(2, 0), jnp.array([11, 7]))

    def answers(params):
        generated = Magma(tiny.MODEL, params, gpt2_tokenizer()).generate_tokens(rows, steps, GREEDY, return_logits=True)
        return generated.tokens, generated.logits

    tokens, logits = answers(params)
    apart = layers_apart(dict(params))
    assert "lm/layers/1/attn/q_proj/weight" in apart
    assert "lm/layers/attn/q_proj/weight" not in apart
    tokens_apart, logits_apart = answers(apart)
    np.testing.assert_array_equal(tokens_apart, tokens)
    np.testing.assert_allclose(logits_apart, logits, atol=1e-5)
    assert tokens.shape == (2, steps)


def test_a_common_beginning_is_run_once(model, prompts, run):
    definition, params = model
    beginning = np.random.default_rng(1).normal(size=(1, 5, 32)).astype(np.float32)
    whole = run([np.concatenate([beginning[0], prompt]) for prompt in prompts], range(4), DRAWN, width=16)

    @jax.jit
    def shared(embeddings, lengths, keys):
        lm = merge(definition, params).lm
        options = {"max_new_tokens": STEPS, "sampling": sampling_rows([DRAWN] * 4), "ends": (-1,)}
        prefix = lm(jnp.asarray(beginning), cache=lm.init_cache(1, 5)).cache
        return generate(lm, embeddings, lengths, keys, prefix=prefix, **options)

    padded = np.stack([np.pad(prompt, ((0, 11 - len(prompt)), (0, 0))) for prompt in prompts])
    keys = jnp.stack([jax.random.key(seed) for seed in range(4)])
    np.testing.assert_array_equal(shared(padded, np.array(LENGTHS, np.int32), keys).tokens, whole.tokens)

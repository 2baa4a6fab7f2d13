import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.inference.decoding import sampling
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.decoding.sampling import (
    MASKED,
    apply_temperature,
    mask_missing_ids,
    remove_after_eos,
    row_keys,
    sampling_rows,
    top_k,
    top_p,
    top_p_upstream,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"
with np.load(FIXTURES / "sampling.npz") as file:
    GOLDEN = dict(file)
LOGITS = jnp.asarray(GOLDEN["logits"])


def filter_logits(logits, config):
    """All rows by one config."""
    return sampling.filter_logits(logits, sampling_rows([config] * len(logits)), compat=config.compat)


def sample(logits, keys, config, **options):
    """All rows by one config."""
    keys = row_keys(jax.random.key(0), len(logits)) if keys is None else keys
    return sampling.sample(logits, keys, sampling_rows([config] * len(logits)), compat=config.compat, **options)


def settings(name: str) -> list[str]:
    return [key.split("/")[1] for key in GOLDEN if key.startswith(f"{name}/")]


def assert_same_tokens_kept(filtered, golden):
    filtered = np.asarray(filtered)
    assert np.isfinite(filtered).all()
    np.testing.assert_array_equal(np.where(filtered == np.float32(MASKED), -np.inf, filtered), golden)


@pytest.mark.parametrize("k", settings("top_k"))
def test_top_k_equals_the_originals(k):
    assert_same_tokens_kept(top_k(LOGITS, int(k)), GOLDEN[f"top_k/{k}"])


def test_top_k_keeps_exactly_k_among_equals():
    tied = jnp.asarray(GOLDEN["tie/logits"])
    assert_same_tokens_kept(top_k(tied, 2, ties="last"), GOLDEN["tie/top_k_2"])
    assert_same_tokens_kept(top_k(tied, 2), [[-np.inf, 2, 2, -np.inf, -np.inf]])
    assert_same_tokens_kept(top_k(tied, 9), tied)


@pytest.mark.parametrize("p", [p for p in settings("top_p_textbook") if float(p) < 1])
def test_top_p_keeps_the_smallest_set_of_that_mass(p):
    kept = top_p(LOGITS, float(p))
    assert_same_tokens_kept(kept, GOLDEN[f"top_p_textbook/{p}"])
    probabilities = np.sort(jax.nn.softmax(LOGITS))[:, ::-1].astype(np.float64)
    for row, count in zip(probabilities, (np.asarray(kept) > MASKED).sum(axis=-1), strict=True):
        assert row[:count].sum() >= float(p) - 1e-6
        assert row[: count - 1].sum() < float(p)


def test_top_p_of_everything_differs_from_the_recorded_run_by_rounding_only():
    ours = np.asarray(top_p(LOGITS, 1.0)) > MASKED
    recorded = np.isfinite(GOLDEN["top_p_textbook/1.0"])
    tail = np.where(ours != recorded, jax.nn.softmax(LOGITS), 0)
    assert tail.sum(axis=-1).max() < 1e-6


def test_top_p_keeps_the_lowest_ids_among_equals_and_never_nothing():
    equal = jnp.zeros((1, 4))
    assert_same_tokens_kept(top_p(equal, 0.5), [[0, 0, -np.inf, -np.inf]])
    assert_same_tokens_kept(top_p(equal, 0.0), [[0, -np.inf, -np.inf, -np.inf]])


@pytest.mark.parametrize("p", settings("top_p_upstream"))
def test_the_originals_top_p_rules_are_reproduced(p):
    assert_same_tokens_kept(top_p_upstream(LOGITS, float(p)), GOLDEN[f"top_p_upstream/{p}"])
    assert_same_tokens_kept(top_p(LOGITS, 1 - float(p)), GOLDEN[f"top_p_first_release/{p}"])


@pytest.mark.parametrize("name", settings("probs_upstream"))
def test_compat_mode_draws_from_the_originals_distribution(name):
    temperature, k, p = name.split("_")
    config = SamplingConfig(float(temperature[1:]), int(k[1:]), float(p[1:]), compat="upstream")
    probabilities = jax.nn.softmax(filter_logits(LOGITS, config))
    np.testing.assert_allclose(probabilities, GOLDEN[f"probs_upstream/{name}"], rtol=0, atol=1e-6)


def test_the_order_is_temperature_then_top_k_then_top_p():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    # Tempered by 2: .33 .28 .23 .16. The top three, renormalised: .39 .34 .27; 0.7 takes two of them.
    kept = filter_logits(logits, SamplingConfig(temperature=2.0, top_k=3, top_p=0.7))
    assert_same_tokens_kept(kept, np.where([[1, 1, 0, 0]], logits / 2, -np.inf))
    # Top-p alone takes three at this temperature and at 1 would take two.
    kept = filter_logits(logits, SamplingConfig(temperature=2.0, top_p=0.7))
    assert (np.asarray(kept) > MASKED).sum() == 3
    for off in (0.0, 1.0):
        assert_same_tokens_kept(filter_logits(logits, SamplingConfig(temperature=1, top_p=off)), logits)


def test_min_p_is_a_share_of_the_likeliest():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for share, count in ((0.0, 4), (0.2, 3), (0.5, 2), (1.0, 1)):
        kept = filter_logits(logits, SamplingConfig(temperature=1, min_p=share))
        assert (np.asarray(kept) > MASKED).sum() == count, share


def test_one_sort_gives_what_the_filters_give_one_after_the_other():
    for k, p in ((5, 0.9), (50, 0.3), (0, 0.7), (7, 1.0)):
        step = apply_temperature(LOGITS, 0.8)
        step = top_k(step, k) if k else step
        step = top_p(step, p) if p < 1 else step
        np.testing.assert_array_equal(filter_logits(LOGITS, SamplingConfig(0.8, k, p)), step)


def test_repetition_penalty_lowers_what_was_seen():
    logits = jnp.array([[2.0, -1.0, 1.5, MASKED]])
    seen = jnp.array([[True, True, False, True]])
    penalized = sampling.penalize_repetition(logits, seen, jnp.array([2.0]))
    np.testing.assert_allclose(penalized, [[1.0, -2.0, 1.5, np.float32(MASKED)]])
    assert sample(logits, None, SamplingConfig(repetition_penalty=2.0), seen=seen)[0] == 2
    assert sample(logits, None, SamplingConfig(), seen=seen)[0] == 0


def test_draws_follow_the_distribution():
    config = SamplingConfig(temperature=0.7, top_k=10, top_p=0.9)
    rows = jnp.broadcast_to(LOGITS[2], (20_000, LOGITS.shape[1]))
    sampled = jax.jit(sample, static_argnums=2)(rows, row_keys(jax.random.key(0), 20_000), config)
    frequency = np.bincount(sampled, minlength=LOGITS.shape[1]) / 20_000
    expected = np.asarray(jax.nn.softmax(filter_logits(LOGITS[2:3], config))[0])
    assert (frequency[expected == 0] == 0).all()
    np.testing.assert_allclose(frequency, expected, atol=0.015)  # four standard deviations of 20,000 draws


@pytest.mark.parametrize("compat", [None, "upstream"])
def test_a_rows_draw_does_not_depend_on_its_neighbours(compat):
    config = SamplingConfig(temperature=1.0, top_k=20, top_p=0.95, compat=compat)
    together = sample(LOGITS, row_keys(jax.random.key(7), 4), config)
    keys = row_keys(jax.random.key(7), 400)
    for row in range(4):
        alone = sample(LOGITS[row : row + 1], keys[row : row + 1], config)
        assert alone[0] == together[row]


def test_steps_draw_anew_and_repeat_for_the_same_key():
    keys = row_keys(jax.random.key(1), 4)
    config = SamplingConfig(temperature=5.0)
    draws = [
        np.asarray(sample(LOGITS, jax.vmap(jax.random.fold_in, (0, None))(keys, step), config)) for step in (0, 1, 2, 0)
    ]
    np.testing.assert_array_equal(draws[0], draws[3])
    assert len({tuple(draw) for draw in draws}) == 3


def test_temperature_zero_is_argmax_without_keys():
    config = SamplingConfig(temperature=0, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(sample(LOGITS, None, config), np.argmax(LOGITS, axis=-1))
    assert sample(jnp.zeros((1, 5)), None, config)[0] == 0


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("compat", [None, "upstream"])
def test_ids_without_an_embedding_are_never_sampled(temperature, compat):
    logits = jnp.tile(jnp.arange(8.0), (2000, 1))  # the missing ids are the likeliest
    for top_p_value in (0.0, 0.9):
        config = SamplingConfig(temperature, top_k=0, top_p=top_p_value, compat=compat)
        sampled = sample(logits, row_keys(jax.random.key(0), 2000), config, table_rows=6)
        assert sampled.max() < 6
    masked = mask_missing_ids(logits, 6)
    assert np.isfinite(masked).all()
    np.testing.assert_array_equal(masked[:, :6], logits[:, :6])


def test_everything_is_finite_in_half_precision_and_at_low_temperature():
    logits = mask_missing_ids(LOGITS.astype(jnp.bfloat16), 30)
    assert logits.dtype == jnp.bfloat16
    assert np.isfinite(logits.astype(jnp.float32)).all()
    keys = row_keys(jax.random.key(0), 4)
    config = SamplingConfig(temperature=1e-6, top_k=5, top_p=0.9)
    np.testing.assert_array_equal(sample(logits, keys, config), np.argmax(logits, axis=-1))
    np.testing.assert_array_equal(apply_temperature(jnp.array([[1.0, MASKED]]), 0.5), [[2.0, np.float32(MASKED)]])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": -0.01},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.01},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_in_one_line(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must") as error:
        SamplingConfig(**bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", json.loads((FIXTURES / "sampling_remove_after_eos.json").read_text()), ids=str)
def test_removal_after_end_of_text(case):
    arguments = case["sequence"], case["eos"], case["image"]
    assert remove_after_eos(*arguments, compat="upstream") == case["result"]
    expected = [] if case["sequence"][:1] == [case["eos"]] else case["result"]
    assert remove_after_eos(*arguments) == expected
    assert case["sequence"] == arguments[0]


def test_removal_with_end_of_text_zero():
    assert remove_after_eos(jnp.array([9, 5, 0, 6, 0]), eos=0, image=9) == [5]


def test_the_smallest_temperature_draws_no_token_that_was_dropped():
    logits = jnp.array([[-50.0, -2.0, -30.0, -4.0, 0.0]])
    sampled = sample(logits, row_keys(jax.random.key(0), 1), SamplingConfig(temperature=1e-30), table_rows=4)
    assert int(sampled[0]) == 1

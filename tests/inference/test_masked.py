"""Masked decoding: schedules equal the original's, counts add up, and places are chosen as a strategy says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.inference.decoding.masked import ImageRule, ImageSteps, draw_tokens, fill_image, fill_text
from magma_jax.inference.decoding.sampling import SamplingRows
from magma_jax.inference.decoding.schedules import (
    halton_ranks,
    highest,
    mask_ratio,
    masked_count,
    remask_scores,
    remasked_count,
    reveal_scores,
    revealed_count,
)

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 3)


@pytest.fixture(scope="module")
def schedules(golden):
    with np.load(golden / "magvlt/schedules.npz") as file:
        return dict(file)


def sizes(name):
    """The two numbers at the end of a name such as L16_S5."""
    first, second = name.split("_")[-2:]
    return int(first[1:]), int(second[1:])


def test_cosine_equals_the_original(schedules):
    grid = jnp.asarray(schedules["grid"])
    np.testing.assert_allclose(mask_ratio("cosine", grid), schedules["t2i_ratio_cosine"], atol=1e-6)
    names = [name for name in schedules if name.startswith("t2i_masked")]
    assert len(names) == 5
    for name in names:
        length, steps = sizes(name)
        masked = [jnp.array([length])]
        for step in range(steps):
            number = revealed_count("cosine", jnp.int32(step), jnp.int32(steps), jnp.array([length]), masked[-1])
            masked.append(masked[-1] - number)
        np.testing.assert_array_equal(np.concatenate(masked), schedules[name], err_msg=name)


def test_text_equals_the_original(schedules):
    names = [name for name in schedules if name.startswith("i2t_masked")]
    assert len(names) == 6
    for name in names:
        length, steps = sizes(name)
        found = [int(remasked_count(jnp.int32(t), jnp.int32(steps), jnp.array([length]))[0]) for t in range(steps)]
        np.testing.assert_array_equal(found, schedules[name], err_msg=name)


def test_next_mask_equals_the_original(schedules):
    previous = jnp.asarray(schedules["next_prev_mask"])
    for number in range(3):
        r = jnp.asarray(schedules[f"next_r{number}"])
        masked = previous.sum(-1)
        after = jnp.clip(masked_count(mask_ratio("cosine", r), jnp.full(2, 20)), 0, masked)
        revealed = highest(jnp.asarray(schedules["next_conf"]), previous, jnp.maximum(masked - after, r < 1))
        np.testing.assert_array_equal(previous & ~revealed, schedules[f"next_mask_r{number}"])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos"])
def test_every_schedule_falls_from_one_to_zero(schedule):
    ratio = mask_ratio(schedule, jnp.linspace(0, 1, 33))
    np.testing.assert_allclose(ratio[jnp.array([0, -1])], [1, 0], atol=1e-6)
    assert bool(jnp.all(jnp.diff(ratio) < 0))


def test_schedules_in_numbers():
    half = jnp.float32(0.5)
    assert float(mask_ratio("linear", half)) == 0.5
    np.testing.assert_allclose(mask_ratio("arccos", half), 2 / 3, atol=1e-6)
    np.testing.assert_allclose(mask_ratio("cosine", half), np.sqrt(0.5), atol=1e-6)


@pytest.mark.parametrize("call", [
    lambda: mask_ratio("square", jnp.zeros(())),
    lambda: reveal_scores("best", jnp.zeros((1, 2)), jnp.float32(1), KEY),
    lambda: remask_scores("best", jnp.zeros((1, 2)), KEY),
])  # fmt: skip
def test_unknown_names(call):
    with pytest.raises(Exception, match=r"square|best"):
        call()


def test_highest_takes_the_first_of_equal_scores_and_only_allowed_places():
    among = jnp.array([[True, False, True, True], [True, True, True, True]])
    found = highest(jnp.array([[0.0, 9.0, 0.0, 0.0], [1.0, 2.0, 3.0, 0.0]]), among, jnp.array([2, 1]))
    np.testing.assert_array_equal(found, [[True, False, True, False], [False, False, True, False]])
    np.testing.assert_array_equal(highest(jnp.zeros((2, 4)), among, jnp.array([9, 0])), among & jnp.array([[1], [0]]))


@pytest.mark.parametrize("strategy", ["multinomial-maskgit", "multinomial", "random"])
def test_strategies_prefer_what_they_say(strategy):
    """How often the likelier of two places is taken first."""
    confidence = jnp.broadcast_to(jnp.array([0.8, 0.2]), (4000, 2))
    scores = reveal_scores(strategy, confidence, jnp.float32(1.0), KEY)
    share = float(jnp.mean(scores[:, 0] > scores[:, 1]))
    assert abs(share - (0.5 if strategy == "random" else 0.8)) < 0.03


def test_noise_of_zero_is_the_choice_by_confidence():
    confidence = jax.random.uniform(KEY, (8, 16), minval=0.01)
    a = reveal_scores("multinomial-maskgit", confidence, jnp.float32(0.0), KEY)
    np.testing.assert_array_equal(
        jnp.argsort(a), jnp.argsort(reveal_scores("maskgit", confidence, jnp.float32(9), KEY))
    )


def test_remasking_prefers_unlikely_tokens():
    log_probs = jnp.log(jnp.broadcast_to(jnp.array([0.8, 0.2]), (4000, 2)))
    scores = remask_scores("sample", log_probs, KEY)
    assert abs(float(jnp.mean(scores[:, 1] > scores[:, 0])) - 0.8) < 0.03  # 1/0.2 : 1/0.8
    topk = remask_scores("topk", log_probs, KEY)
    assert bool(jnp.all(topk[:, 1] > topk[:, 0]))


TABLE = jax.random.normal(jax.random.key(1), (12, 12))


def predict(tokens, masked):
    """Logits that depend on the neighbour on the left."""
    return TABLE[jnp.where(masked, 0, tokens)] + TABLE[jnp.roll(jnp.where(masked, 0, tokens), 1, -1)]


def rows(number, temperature=1.0, top_k=0):
    def full(value, dtype=jnp.float32):
        return jnp.full(number, value, dtype)

    return SamplingRows(full(temperature), full(top_k, jnp.int32), full(1.0), full(0.0), full(1.0))


@pytest.mark.parametrize("strategy", ["multinomial-maskgit", "maskgit", "multinomial", "random"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos"])
def test_images_keep_what_is_kept_and_what_was_revealed(strategy, schedule):
    tokens = jax.random.randint(KEY, (3, 12), 0, 12)
    # Rows with many, with fewer than steps, and with one editable place.
    editable = jnp.arange(12) < jnp.array([[12], [3], [1]])
    filled = fill_image(
        predict, tokens, editable, KEYS, ImageSteps(steps=6), rule=ImageRule(strategy, schedule), record=8
    )
    np.testing.assert_array_equal(jnp.where(editable, 0, filled.tokens), jnp.where(editable, 0, tokens))
    masked = filled.trace.masked
    assert bool(jnp.all(masked[0] == editable))
    assert masked.sum(-1)[:, 1].tolist() == [3, 2, 1, 0, 0, 0, 0, 0] if schedule == "cosine" else True
    assert not masked[6:].any()
    for step in range(5):
        assert not (masked[step + 1] & ~masked[step]).any()
        revealed = masked[step] & ~masked[step + 1]
        assert revealed[0].any()
        np.testing.assert_array_equal(filled.tokens[revealed], filled.trace.tokens[step][revealed])


def test_temperature_zero_is_the_likeliest():
    logits = jax.random.normal(KEY, (5, 9))
    np.testing.assert_array_equal(draw_tokens(KEY, logits, jnp.zeros(5)), jnp.argmax(logits, -1))
    tokens, editable = jnp.zeros((2, 12), jnp.int32), jnp.ones((2, 12), bool)
    settings = ImageSteps(steps=1, temperature=(0.0, 0.0))
    filled = fill_image(predict, tokens, editable, KEYS[:2], settings)
    np.testing.assert_array_equal(filled.tokens, jnp.argmax(predict(tokens, editable), -1))
    text = fill_text(predict, tokens, editable, KEYS[:2], jnp.int32(1), rows(2, temperature=0.0))
    np.testing.assert_array_equal(text.tokens, filled.tokens)


FIRST = ([0, 1], [0, 1], [2, 0])


def test_the_same_key_gives_the_same_and_another_another():
    tokens, editable = jnp.zeros((2, 12), jnp.int32), jnp.ones((2, 12), bool)
    a, b, c = (fill_image(predict, tokens, editable, KEYS[jnp.array(rows)], ImageSteps()).tokens for rows in FIRST)
    np.testing.assert_array_equal(a, b)
    assert bool(jnp.any(a != c))
    np.testing.assert_array_equal(a[0], c[1])  # a row depends on its key alone


@pytest.mark.parametrize("remask", ["topk", "sample"])
def test_texts_are_revised_within_their_places(remask):
    tokens = jnp.full((3, 12), 7, jnp.int32)
    editable = (jnp.arange(12) < jnp.array([[12], [4], [1]])) & (jnp.arange(12) != 2)
    filled = fill_text(predict, tokens, editable, KEYS, jnp.int32(4), rows(3, top_k=3), remask=remask, record=4)
    assert bool(jnp.all(jnp.where(editable, 7, filled.tokens) == 7))
    assert filled.trace.masked.sum(-1).tolist() == [[11, 3, 1], [8, 2, 1], [5, 1, 1], [2, 1, 1]]
    assert not (filled.trace.masked & ~editable).any()
    assert bool(jnp.all(jnp.where(editable, filled.log_probs < 0, filled.log_probs == 0)))


def test_haltons_order_meets_every_place_and_spreads_the_first_ones():
    ranks = halton_ranks(64)
    assert sorted(ranks.tolist()) == list(range(64))
    rows, columns = np.divmod(np.argsort(ranks)[:4], 8)
    assert len(set(zip(rows // 4, columns // 4, strict=True))) >= 3  # quarters of the grid
    with pytest.raises(ValueError, match="Halton's order needs a square of positions, not 12"):
        halton_ranks(12)


def test_top_p_leaves_the_likeliest():
    tokens, editable = jnp.zeros((2, 12), jnp.int32), jnp.ones((2, 12), bool)
    settings = ImageSteps(steps=1, temperature=(1.0, 1.0), top_p=1e-6)
    filled = fill_image(predict, tokens, editable, KEYS[:2], settings)
    np.testing.assert_array_equal(filled.tokens, jnp.argmax(predict(tokens, editable), -1))


def test_top_k_of_one_is_certain():
    tokens, editable = jnp.zeros((2, 12), jnp.int32), jnp.ones((2, 12), bool)
    filled = fill_text(predict, tokens, editable, KEYS[:2], jnp.int32(3), rows(2, top_k=1))
    np.testing.assert_array_equal(filled.log_probs, 0)

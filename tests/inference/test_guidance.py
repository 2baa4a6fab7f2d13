"""Guidance and contrastive decoding equal the formulas of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.inference.decoding.guidance import contrast, guide, guide_edit
from magma_jax.inference.decoding.sampling import MASKED, top_p


@pytest.fixture(scope="module")
def rules(golden):
    with np.load(golden / "cm3leon/decoding_rules.npz") as file:
        return {name: jnp.asarray(file[name]) for name in file}


@pytest.mark.parametrize("weight", [1.0, 3.0, 6.0])
def test_guidance_equals_the_formula(rules, weight):
    got = guide(rules["cond"], rules["uncond"], weight)
    np.testing.assert_allclose(got, rules[f"cfg_{weight}"], atol=1e-5)
    # Weights of rows may differ.
    weights = jnp.array([weight, 1, 1, 0, 1, weight])
    mixed = jax.jit(guide)(rules["cond"], rules["uncond"], weights)
    np.testing.assert_allclose(mixed[jnp.array([0, 5])], got[jnp.array([0, 5])], atol=1e-5)
    np.testing.assert_array_equal(mixed[jnp.array([1, 2, 4])], rules["cond"][jnp.array([1, 2, 4])])
    np.testing.assert_allclose(mixed[3], rules["uncond"][3], atol=1e-6)


def test_guidance_of_edits_equals_the_formula(rules):
    streams = rules["uncond"], rules["image_only"], rules["cond"]
    got = guide_edit(*streams, image_weight=1.5, text_weight=7.5)
    np.testing.assert_allclose(got, rules["cfg_two_way_image1.5_text7.5"], atol=2e-5)
    np.testing.assert_array_equal(guide_edit(*streams, image_weight=1, text_weight=1), rules["cond"])
    # With the image's weight alone it is guidance by the image, and without an image guidance by the text.
    np.testing.assert_allclose(
        guide_edit(*streams, image_weight=2.0, text_weight=0.0), guide(streams[1], streams[0], 2.0), atol=1e-5
    )
    np.testing.assert_allclose(
        guide_edit(streams[0], streams[0], streams[2], image_weight=2.0, text_weight=3.0),
        guide(streams[2], streams[0], 3.0),
        atol=1e-5,
    )


def test_dropped_tokens_stay_dropped(rules):
    cond, uncond = (rules[name].at[:, :5].set(MASKED) for name in ("cond", "uncond"))
    np.testing.assert_array_equal(guide(cond, uncond, 4.0)[:, :5], np.float32(MASKED))
    assert np.isfinite(contrast(cond, uncond, k=4, alpha=0.5)).all()


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_contrastive_decoding_keeps_and_scores_by_the_formula(rules, k, alpha):
    got = contrast(rules["cond"], rules["uncond"], k=k, alpha=alpha)
    keep, score = rules[f"cdk_keep_k{k}_a{alpha}"], rules[f"cdk_score_k{k}_a{alpha}"]
    np.testing.assert_array_equal(got > MASKED, keep)
    np.testing.assert_allclose(jnp.where(keep, got, 0), jnp.where(keep, score, 0), atol=1e-5)
    assert np.all(keep.sum(-1) >= k)


def test_the_threshold_is_the_experts(rules):
    """The amateur decides nothing about which tokens are plausible."""
    keep = contrast(rules["cond"], rules["uncond"], k=4, alpha=0.5) > MASKED
    other = contrast(rules["cond"], rules["uncond"][:, ::-1] * 3, k=4, alpha=0.5) > MASKED
    np.testing.assert_array_equal(keep, other)


@pytest.mark.parametrize("p", [0.3, 0.8, 0.95])
def test_top_p_after_guidance(rules, p):
    got = top_p(rules["cond"], p)
    np.testing.assert_array_equal(got > MASKED, rules[f"topp_keep_{p}"])
    np.testing.assert_allclose(jax.nn.softmax(got), rules[f"topp_prob_{p}"], atol=1e-6)


def test_rows_have_values_of_their_own(rules):
    cond, uncond = rules["cond"][:3], rules["uncond"][:3]
    asked = [(1, 0.5), (16, 0.1), (4, 1.0)]
    k, alpha = jnp.array([k for k, _ in asked]), jnp.array([alpha for _, alpha in asked])
    together = jax.jit(contrast)(cond, uncond, k=k, alpha=alpha)
    for row, (k, alpha) in enumerate(asked):
        alone = contrast(cond[row : row + 1], uncond[row : row + 1], k=k, alpha=alpha)
        np.testing.assert_allclose(together[row : row + 1], alone, atol=1e-5)

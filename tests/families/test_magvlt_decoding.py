"""The released samplers: token-identical runs, one compilation, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.families.magvlt.decoding.image import ImageRun, blank, canvases, inpaint, text_to_image
from magma_jax.families.magvlt.decoding.likelihood import likelihood
from magma_jax.families.magvlt.decoding.open_model import OpenModel
from magma_jax.families.magvlt.decoding.pairs import draw_pairs, pair_length_logits
from magma_jax.families.magvlt.decoding.text import TextRun, image_to_text, infill_text, length_logits
from magma_jax.inference.decoding.masked import ImageRule, ImageSteps
from magma_jax.inference.decoding.sampling import SamplingRows
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.nn.modules import abstract
from magma_jax.published.keymap.engine import to_ours
from magma_jax.published.magvlt_keys import transformer_table
from magma_jax.runtime.compilations import compilations_of_process
from magma_jax.storage.torch.reader import open_torch_file, state_dict

TINY = MagvltConfig(layers=2, width=32, heads=4, image_rows=37, text_rows=53, image_positions=16, text_positions=8)
KEYS = jax.random.split(jax.random.key(0), 3)
PAD = 52
# Where a sequence's image and text begin.
IMAGE, TEXT = 12, 20


@pytest.fixture(scope="module")
def model(golden_checkpoint):
    definition, shapes, _ = abstract(lambda: MagvltModel(TINY, rngs=nnx.Rngs(0)))
    with open_torch_file(golden_checkpoint("magvlt/stage2")) as file:
        planned = to_ours(transformer_table(), state_dict(file.tree)[0], shapes)
        return OpenModel(TINY, definition, {path: jnp.asarray(tensor.read()) for path, tensor in planned.items()}, PAD)


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "magvlt/decode.npz") as file:
        return dict(file)


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def likeliest(key, logits, temperature):
    return jnp.argmax(logits, -1).astype(jnp.int32)


def sampling(rows, temperature=0.7, top_k=10):
    def full(value, dtype=np.float32):
        return np.full(rows, value, dtype)

    return SamplingRows(full(temperature), full(top_k, np.int32), full(1.0), full(0.0), full(1.0))


# The golden runs take the likeliest token and the most confident places.
GOLDEN_IMAGE = ImageRun(settings=ImageSteps(steps=5), rule=ImageRule("maskgit"), draw=likeliest, record=5)
GOLDEN_TEXT = TextRun(steps=4, remask="topk", draw=likeliest, record=4)


def check_image(filled, arrays, name):
    places = slice(IMAGE, IMAGE + 16)
    np.testing.assert_array_equal(filled.tokens, arrays[f"{name}/final_code"].reshape(3, 16))
    np.testing.assert_array_equal(filled.trace.masked, arrays[f"{name}/mask_before"][..., places])
    np.testing.assert_array_equal(filled.trace.masked[1:], arrays[f"{name}/mask_after"][:-1, :, places])
    np.testing.assert_allclose(filled.trace.scores, arrays[f"{name}/confidence"][..., places], rtol=0, atol=1e-4)


def test_text_to_image_equals_the_original(model, arrays):
    lengths = arrays["t2i/txt_mask"].sum(-1)
    check_image(text_to_image(model, arrays["t2i/txt"], lengths, KEYS, GOLDEN_IMAGE), arrays, "t2i")


def test_inpainting_equals_the_original(model, arrays):
    """Four editable codes in five steps."""
    image = np.repeat(arrays["it2i/src_codes"], 3, 0)
    editable = np.repeat(arrays["it2i/keep"].reshape(1, 16), 3, 0) == 0
    lengths = arrays["t2i/txt_mask"].sum(-1)
    filled = inpaint(model, image, editable, arrays["t2i/txt"], lengths, KEYS, GOLDEN_IMAGE)
    check_image(filled, arrays, "it2i")
    np.testing.assert_array_equal(np.where(editable, 0, filled.tokens), np.where(editable, 0, image))


def test_guidance_of_one_is_none_and_of_zero_ignores_the_text(model, arrays):
    texts, lengths = arrays["t2i/txt"], arrays["t2i/txt_mask"].sum(-1)

    def codes(texts, lengths, guidance):
        run = dataclasses.replace(GOLDEN_IMAGE, guidance=guidance)
        return text_to_image(model, texts, lengths, KEYS, run).tokens

    empty = codes(np.full_like(texts, PAD), np.ones(3, int), 1.0)
    np.testing.assert_array_equal(codes(texts, lengths, 0.0), empty)
    assert (codes(texts, lengths, 3.0) != codes(texts, lengths, 1.0)).any()


def test_canvases_end_in_the_whole_run(model, arrays):
    lengths = arrays["t2i/txt_mask"].sum(-1)
    run = ImageRun(settings=ImageSteps(steps=4))
    seen = list(canvases(model, *blank(TINY, 3), arrays["t2i/txt"], lengths, KEYS, run))
    whole = text_to_image(model, arrays["t2i/txt"], lengths, KEYS, run)
    assert [int(canvas.masked[0].sum()) for canvas in seen] == [15, 12, 7, 0]
    np.testing.assert_array_equal(seen[-1].tokens, whole.tokens)
    np.testing.assert_array_equal(seen[-1].log_probs, whole.log_probs)


def test_pairs_are_drawn_together(model):
    lengths = np.array([8, 3, 1])
    assert pair_length_logits(model, 3).shape == (3, 8)
    image, text = draw_pairs(model, lengths, KEYS, sampling(3), ImageRun(settings=ImageSteps(steps=4)))
    assert bool((image.log_probs < 0).all())
    np.testing.assert_array_equal(text.log_probs < 0, np.arange(8) < lengths[:, None])
    np.testing.assert_array_equal(text.tokens[2, 1:], PAD)
    alone = draw_pairs(model, lengths[:1], KEYS[:1], sampling(1), ImageRun(settings=ImageSteps(steps=4)))
    np.testing.assert_array_equal(alone[0].tokens[0], image.tokens[0])


def test_likelihood_prefers_the_drawn_text(model, arrays):
    image = arrays["i2t/img"]
    one_shot = dataclasses.replace(GOLDEN_TEXT, steps=1, record=0)
    filled, lengths = image_to_text(model, image, KEYS, sampling(3), one_shot)
    found = likelihood(model, image, filled.tokens, lengths, of="text")
    other = likelihood(model, image, np.zeros((3, 8), int), lengths, of="text")
    assert (found > other).all()


def test_likelihood_prefers_the_drawn_image(model, arrays):
    lengths = arrays["t2i/txt_mask"].sum(-1)
    run = ImageRun(settings=ImageSteps(steps=1), draw=likeliest)
    drawn = np.asarray(text_to_image(model, arrays["t2i/txt"], lengths, KEYS, run).tokens)
    found = likelihood(model, drawn, arrays["t2i/txt"], lengths, of="image")
    assert (found > likelihood(model, np.roll(drawn, 1, axis=1), arrays["t2i/txt"], lengths, of="image")).all()
    assert (found != likelihood(model, drawn, np.roll(arrays["t2i/txt"], 1, axis=1), lengths, of="image")).all()


def test_length_equals_the_original(model, arrays):
    found = length_logits(model, arrays["i2t/img"])
    np.testing.assert_allclose(found, arrays["i2t/length_logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(jnp.argmax(found, -1) + 1, arrays["i2t/N_pred"])


def test_image_to_text_equals_the_original(model, arrays):
    filled, lengths = image_to_text(
        model, arrays["i2t/img"], KEYS, sampling(3), GOLDEN_TEXT, lengths=arrays["i2t/N_given"]
    )
    np.testing.assert_array_equal(lengths, arrays["i2t/N_given"])
    np.testing.assert_array_equal(filled.tokens, arrays["i2t/tokens"])
    np.testing.assert_allclose(filled.log_probs.sum(-1), arrays["i2t/score"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(filled.trace.masked, arrays["i2t/masks"][..., TEXT:])
    before = np.concatenate([np.zeros((1, 3, 8)), filled.trace.scores[:-1]])
    np.testing.assert_allclose(before, arrays["i2t/prev_log_probs"], rtol=0, atol=1e-4)


def test_predicted_lengths_are_used(model, arrays):
    filled, lengths = image_to_text(model, arrays["i2t/img"], KEYS, sampling(3), TextRun())
    np.testing.assert_array_equal(lengths, arrays["i2t/N_pred"])
    assert bool(jnp.all(jnp.where(jnp.arange(8) < lengths[:, None], PAD, filled.tokens) == PAD))


def test_infilling_keeps_the_rest(model, arrays):
    text = jnp.asarray(np.random.default_rng(0).integers(0, 50, (3, 8)), jnp.int32)
    editable = (jnp.arange(8) >= 2) & (jnp.arange(8) < 5)
    places = jnp.broadcast_to(editable, (3, 8))
    lengths = jnp.array([8, 6, 3])
    filled, _ = infill_text(model, arrays["i2t/img"], text, places, lengths, KEYS, sampling(3), TextRun())
    kept = (jnp.arange(8) < lengths[:, None]) & ~editable
    np.testing.assert_array_equal(filled.tokens[kept], text[kept])


def test_stored_bfloat16_is_computed_in_bfloat16(model, arrays):
    """Logits are close to those of fp32, and not equal."""
    params = {path: leaf.astype(jnp.bfloat16) for path, leaf in model.params.items()}
    half = dataclasses.replace(model, params=params)
    found, exact = (length_logits(each, arrays["i2t/img"]) for each in (half, model))
    assert found.dtype == jnp.float32
    difference = np.abs(found - exact).max()
    assert 1e-4 < difference < 0.3
    filled = text_to_image(half, arrays["t2i/txt"], np.array([8, 2, 2]), KEYS)
    assert filled.tokens.dtype == jnp.int32


def test_other_steps_temperatures_and_lengths_compile_nothing(model, arrays):
    texts, images = arrays["t2i/txt"], arrays["i2t/img"]

    def run(steps, temperature, lengths, top_k, keys, guidance):
        settings = ImageSteps(steps, (temperature, 1), (2 * temperature, 0), top_p=1 - temperature / 10)
        image = text_to_image(model, texts, lengths, keys, ImageRun(settings=settings, guidance=guidance))
        rows = sampling(3, temperature, top_k)
        text, _ = image_to_text(model, images, keys, rows, TextRun(steps=steps), lengths=lengths)
        return jax.block_until_ready((image.tokens, text.tokens))

    run(3, 1.0, np.array([8, 2, 2]), 5, KEYS, 1.0)
    keys = jax.random.split(jax.random.key(2), 3)
    counter = compilations_of_process()
    before = counter.count
    run(9, 0.5, np.array([1, 8, 4]), 0, keys, 3.5)
    run(1, 2, np.array([3, 3, 3]), 7, keys, 0.0)
    assert counter.count == before


def test_static_settings_do_compile(model, arrays):
    """The counter of the test above counts."""
    counter = compilations_of_process()
    before = counter.count
    run = ImageRun(rule=ImageRule("random", "arccos"))
    text_to_image(model, arrays["t2i/txt"], np.array([8, 2, 2]), KEYS, run)
    assert counter.count > before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((2, 15), int)}, r"image has the shape \(2, 15\); \(2, 16\) is needed"),
        ({"image": np.full((2, 16), 37)}, "image holds ids from 37 to 37; the model knows 0 to 36"),
        ({"editable": np.ones((2, 4, 4), bool)}, r"editable has the shape \(2, 4, 4\)"),
        ({"editable": np.eye(2, 16)[:, ::-1][[0, 0]] * 0}, "editable keeps everything in a row"),
        ({"text": np.zeros((2, 9), int)}, r"text has the shape \(2, 9\); \(2, 8\) is needed"),
        ({"text": np.full((2, 8), -1)}, "text holds ids from -1"),
        ({"text_lengths": [0, 3]}, "lengths are 0 to 3; the model knows texts of 1 to 8 tokens"),
        ({"text_lengths": [3]}, r"lengths has the shape \(1,\)"),
        ({"run": ImageRun(settings=ImageSteps(steps=0))}, "0 steps; give at least 1"),
    ],
)
def test_refused_images(model, change, message):
    arguments = {
        "image": np.zeros((2, 16), int),
        "editable": np.ones((2, 16), bool),
        "text": np.zeros((2, 8), int),
        "text_lengths": [1, 8],
        "run": ImageRun(),
    }
    with pytest.raises(ValueError, match=message):
        inpaint(model, **(arguments | change), keys=KEYS[:2])


@pytest.mark.parametrize(
    ("change", "lengths", "message"),
    [
        ({"steps": 0}, None, "0 steps"),
        ({}, [9, 1], "lengths are 1 to 9"),
    ],
)
def test_refused_texts(model, change, lengths, message):
    run = TextRun(**change)
    with pytest.raises(ValueError, match=message):
        image_to_text(model, np.zeros((2, 16), int), KEYS[:2], sampling(2), run, lengths=lengths)

"""The losses: equal to the golden ones on given masks, counts by task, masks by ratio, and a model that learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.families.magvlt import MAGVLT
from magma_jax.families.magvlt.decoding.open_model import OpenModel
from magma_jax.families.magvlt.decoding.text import length_logits
from magma_jax.families.magvlt.loss import magvlt_loss, pass_totals
from magma_jax.families.magvlt.masking import draw_masks, image_count, nested_count, row_keys, text_count
from magma_jax.families.magvlt.mixing import Halves, mixed
from magma_jax.families.magvlt.options import BOTH, IMAGE_TO_TEXT, TEXT_TO_IMAGE, MagvltOptions
from magma_jax.families.magvlt.sharding import SHARDINGS
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.layout import layout_of
from magma_jax.models.magvlt.model import MagvltModel, canvas_of
from magma_jax.nn.modules import abstract, merge, split
from magma_jax.published.keymap.engine import to_ours
from magma_jax.published.magvlt_keys import transformer_table
from magma_jax.runtime.sharding import MeshConfig, make_mesh, on_mesh, parameter_shardings, place_batch
from magma_jax.storage.torch.reader import open_torch_file, state_dict
from magma_jax.training.step.flops import matmul_flops
from magma_jax.training.step.terms import learned_counts, term_means

TINY = MagvltConfig(layers=2, width=32, heads=4, image_rows=37, text_rows=53, image_positions=16, text_positions=8)
KEY = jax.random.key(0)
PAD = 52
TASKS = {
    "t2i": ("text_first", ("image",)),
    "i2t": ("image_first", ("text",)),
    "it2it": ("image_first", ("image", "text")),
}


@pytest.fixture(scope="module")
def model(golden_checkpoint):
    definition, shapes, _ = abstract(lambda: MagvltModel(TINY, rngs=nnx.Rngs(0)))
    with open_torch_file(golden_checkpoint("magvlt/stage2")) as file:
        planned = to_ours(transformer_table(), state_dict(file.tree)[0], shapes)
        return merge(definition, {path: jnp.asarray(tensor.read()) for path, tensor in planned.items()})


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "magvlt/forward.npz") as file:
        return {name: jnp.asarray(array) for name, array in file.items()}


def batch(task, rows=4):
    rng = np.random.default_rng(0)
    raw = {
        "codes": rng.integers(0, 37, (rows, 16)).astype(np.int32),
        "tokens": rng.integers(0, 50, (rows, 8)).astype(np.int32),
        "lengths": rng.integers(1, 9, rows).astype(np.int32),
        "seeds": rng.integers(2**32, size=rows, dtype=np.uint32),
    }
    raw["tokens"][np.arange(8) >= raw["lengths"][:, None] - 1] = PAD
    own = Halves(rng.integers(0, 37, (rows, 4, 2)), rng.integers(0, 37, (rows, 2, 4)))
    halves = own, Halves(*(np.roll(codes, -1, 0) for codes in own))
    partners = {f"partner_{name}": np.roll(raw[name], -1, 0) for name in ("tokens", "lengths")}
    found = raw | {"task": np.full(rows, task, np.int32), "unroll_seeds": raw["seeds"] ^ np.uint32(12345)}
    found |= mixed(raw | partners, task, halves, stacked=True, pad_id=PAD, separator=51)
    return {name: jnp.asarray(array) for name, array in found.items()}


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
@pytest.mark.parametrize("case", TASKS)
def test_losses_equal_the_golden_ones(case, smoothing, model, arrays):
    order, predicted = TASKS[case]
    layout, masked = layout_of(TINY, order), arrays[f"{case}/loc_mask"]
    canvas = canvas_of(
        arrays[f"{case}/img"],
        arrays[f"{case}/txt"],
        arrays[f"{case}/n_txt"],
        image_masked=masked[:, layout.image : layout.image + 16],
        text_masked=masked[:, layout.text : layout.text + 8],
    )
    options = MagvltOptions(label_smoothing=smoothing)
    with jax.default_matmul_precision("highest"):
        totals = pass_totals(model, order, canvas, predicted, dropout_key=None, options=options)
    ending = "" if smoothing else "_nosmooth"
    for name, short in (("image", "img"), ("text", "txt")):
        if name in predicted:
            mean = getattr(totals, name) / getattr(canvas, f"{name}_masked").sum()
            np.testing.assert_allclose(mean, arrays[f"{case}/ce_{short}_masked_mean{ending}"], rtol=1e-5)
    if order == "image_first":
        np.testing.assert_allclose(totals.length / 3, arrays[f"{case}/ce_len_mean_nosmooth"], rtol=1e-5)


@pytest.mark.parametrize("case", TASKS)
def test_numbers_of_masks_equal_the_original(case, arrays):
    order, predicted = TASKS[case]
    layout, masked, r = layout_of(TINY, order), arrays[f"{case}/loc_mask"], arrays[f"{case}/r"]
    if "image" in predicted:
        found = image_count(r, jnp.full(r.shape, 16))
        np.testing.assert_array_equal(found, masked[:, layout.image : layout.image + 16].sum(-1))
    if "text" in predicted:
        found = text_count(r, arrays[f"{case}/n_txt"])
        np.testing.assert_array_equal(found, masked[:, layout.text : layout.text + 8].sum(-1))


def test_all_maskable_places_are_equally_likely_and_padding_is_never_masked():
    words = jnp.broadcast_to(jnp.arange(8) < 4, (4000, 8))
    masks = draw_masks(row_keys(jnp.arange(4000), 0), jnp.ones((4000, 16), bool), words, independent=False)
    share = masks.text.mean(0)
    np.testing.assert_allclose(share, [float(share[0])] * 4 + [0] * 4, atol=0.04)
    share = masks.image.mean(0)
    np.testing.assert_allclose(share, np.full(16, share.mean()), atol=0.04)


def test_one_draw_masks_both_in_opposite_directions():
    places, words = jnp.ones((500, 16), bool), jnp.ones((500, 8), bool)
    shares = {}
    for independent in (False, True):
        masks = draw_masks(row_keys(jnp.arange(500), 0), places, words, independent=independent)
        shares[independent] = np.corrcoef(masks.image.sum(-1), masks.text.sum(-1))[0, 1]
    assert shares[False] < -0.9
    assert abs(shares[True]) < 0.2


def test_targets_are_a_random_part_of_the_masked_codes():
    places, words = jnp.ones((2000, 16), bool), jnp.ones((2000, 8), bool)
    masks = draw_masks(row_keys(jnp.arange(2000), 0), places, words, independent=False, limit=4)
    assert not (masks.targets & ~masks.image).any()
    np.testing.assert_array_equal(masks.targets.sum(-1), jnp.minimum(masks.image.sum(-1), 4))
    share = masks.targets.mean(0)
    np.testing.assert_allclose(share, np.full(16, share.mean()), atol=0.04)


def test_some_images_are_masked_as_a_whole():
    """Masks of the others stay as they are."""
    places, words = jnp.ones((2000, 16), bool), jnp.ones((2000, 8), bool)
    plain, some = (
        draw_masks(row_keys(jnp.arange(2000), 0), places, words, independent=False, blank=blank).image
        for blank in (0.0, 0.3)
    )
    changed = np.asarray((plain != some).any(-1))
    assert np.asarray(some)[changed].all()
    assert changed.mean() == pytest.approx(0.3 * (1 - float(plain.all(-1).mean())), abs=0.04)


def test_nested_masks_lie_within_the_first():
    places, words = jnp.ones((200, 16), bool), jnp.ones((200, 8), bool)
    first = draw_masks(row_keys(jnp.arange(200), 0), places, words, independent=False)
    second = draw_masks(row_keys(jnp.arange(200), 1), first.image, first.text, independent=False, nested=True)
    for outer, inner in zip(first, second, strict=True):
        assert not (inner & ~outer).any()
        assert bool((inner.sum(-1) >= 1).all())
    assert nested_count(jnp.array([0.5, 0.1, 1.0]), jnp.array([5, 5, 5])).tolist() == [2, 1, 5]


def test_mixed_texts_stand_in_their_order():
    raw = {
        "codes": np.zeros((3, 16), np.int32),
        "tokens": np.array([[1, 2, PAD, PAD, PAD, PAD, PAD, PAD], [3] * 8, [4, *[PAD] * 7]], np.int32),
        "lengths": np.array([3, 8, 2], np.int32),
        "seeds": np.array([1, 2, 3], np.uint32),
    }
    raw |= {f"partner_{name}": np.roll(raw[name], -1, 0) for name in ("tokens", "lengths")}
    found = mixed(raw, TEXT_TO_IMAGE, None, stacked=False, pad_id=PAD, separator=51)
    # Room for three of each; the second row is the one to serve, behind its partner.
    expected = [[1, 2, 51, 3, 3, 3, PAD, PAD], [4, 51, 3, 3, 3, PAD, PAD, PAD], [4, 51, 1, 2, PAD, PAD, PAD, PAD]]
    np.testing.assert_array_equal(found["mixed_tokens"], expected)
    assert found["mixed_lengths"].tolist() == [7, 6, 5]
    assert found["selectors"].tolist() == [6, 7, 6]
    np.testing.assert_array_equal(found["mixed_codes"], raw["codes"])
    own = Halves(np.full((3, 4, 2), 1), np.full((3, 2, 4), 1))
    halves = own, Halves(*(2 * codes for codes in own))
    found = mixed(raw, BOTH, halves, stacked=True, pad_id=PAD, separator=51)
    assert found["selectors"].tolist() == [8, 9, 8]
    np.testing.assert_array_equal(found["mixed_codes"][:2], [[1] * 8 + [2] * 8, [2] * 8 + [1] * 8])
    np.testing.assert_array_equal(found["mixed_image_places"], found["mixed_codes"] == 1)
    np.testing.assert_array_equal(np.argwhere(found["mixed_text_places"][1])[:, 0], [2, 3, 4])
    found = mixed(raw, IMAGE_TO_TEXT, halves, stacked=False, pad_id=PAD, separator=51)
    np.testing.assert_array_equal(found["mixed_codes"][0].reshape(4, 4), [[1, 1, 2, 2]] * 4)
    np.testing.assert_array_equal(found["mixed_tokens"], raw["tokens"])


@pytest.mark.parametrize(
    ("task", "counted"),
    [(TEXT_TO_IMAGE, {"image"}), (IMAGE_TO_TEXT, {"text", "length"}), (BOTH, {"image", "text", "length"})],
)
def test_terms_of_a_task(task, counted, model):
    """In parts and on eight devices they are the same: masks, guesses and mixed contexts follow from the rows."""
    definition, params = split(model)
    options = MagvltOptions(length_weight=0.5, unroll_weight=0.25, task_weights=tuple(np.eye(3)[task].tolist()))

    def terms(params, rows):
        return magvlt_loss(merge(definition, params), rows, None, options=options)

    rows = batch(task, 8)
    whole = jax.jit(terms)(params, rows)
    for name in ("image", "text", "length"):
        kinds = ("",) if name == "length" else ("", "unroll_", "mixsel_")
        for kind in kinds:
            assert (whole[kind + name].count > 0) == (name in counted)
            assert (whole[kind + name].total > 0) == (name in counted)
            assert whole[f"{kind}{name}_accuracy"].weight == 0
    means = term_means(whole)
    parts = [sum(means[f"{kind}{name}"] for name in ("image", "text")) for kind in ("", "unroll_", "mixsel_")]
    loss = parts[0] + 0.25 * parts[1] + 0.5 * parts[2] + 0.5 * means["length"]
    np.testing.assert_allclose(means["loss"], loss, rtol=1e-6)
    half = jax.jit(terms)
    summed = jax.tree.map(
        jnp.add, *(half(params, jax.tree.map(lambda array, i=i: array[i::2], rows)) for i in range(2))
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    shardings = parameter_shardings(params, mesh, SHARDINGS)
    placed = {path: jax.device_put(leaf, shardings[path]) for path, leaf in params.items()}
    spread = jax.jit(on_mesh(terms, mesh))(placed, place_batch(rows, mesh, 8))
    for name, term in whole.items():
        for other in (summed, spread):
            np.testing.assert_array_equal(other[name].count, term.count, err_msg=name)
            if "accuracy" not in name:
                np.testing.assert_allclose(other[name].total, term.total, rtol=1e-4, err_msg=name)


def test_a_loss_of_some_targets_is_that_of_their_logits(model):
    definition, params = split(model)
    rows = batch(TEXT_TO_IMAGE)
    task = {"task_weights": (1.0, 0.0, 0.0), "unroll_weight": 0.0, "mixsel_weight": 0.0, "label_smoothing": 0.0}
    options = MagvltOptions(**task, image_targets=3)
    found = jax.jit(lambda p: magvlt_loss(merge(definition, p), rows, None, options=options))(params)["image"]
    words = jnp.arange(8) < rows["lengths"][:, None]
    masks = draw_masks(row_keys(rows["seeds"], 0), jnp.ones((4, 16), bool), words, independent=False, limit=3)
    canvas = canvas_of(rows["codes"], rows["tokens"], rows["lengths"], image_masked=masks.image)
    log_probs = jax.nn.log_softmax(model.logits(model.hidden("text_first", canvas).image, "image"))
    right = jnp.take_along_axis(log_probs, rows["codes"][..., None], -1)[..., 0]
    assert found.count == masks.targets.sum()
    np.testing.assert_allclose(found.total, -(right * masks.targets).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="image_targets must not be negative, got -1"):
        MagvltOptions(image_targets=-1)


def test_the_length_is_learned_beside_the_text_that_inference_shows(model):
    """Beside the dummy text its loss does not depend on the image's own text, and is that of ``length_logits``."""
    options = MagvltOptions(task_weights=(0.0, 1.0, 0.0), unroll_weight=0.0, mixsel_weight=0.0, length_text="dummy")
    loss = jax.jit(lambda rows: magvlt_loss(model, rows, None, options=options)["length"])
    rows = batch(IMAGE_TO_TEXT)
    opened = OpenModel(TINY, *split(model), PAD)
    log_probs = jax.nn.log_softmax(length_logits(opened, rows["codes"]), -1)
    right = jnp.take_along_axis(log_probs, rows["lengths"][:, None] - 1, -1)
    np.testing.assert_allclose(loss(rows).total, -right.sum(), rtol=1e-5)
    own = dataclasses.replace(options, length_text="own")
    assert abs(float(magvlt_loss(model, rows, None, options=own)["length"].total + right.sum())) > 1e-3


def test_ablations_save_their_passes(model):
    definition, params = split(model)

    def flops(**changes):
        options = MagvltOptions(task_weights=(1.0, 0.0, 0.0), **changes)

        def loss(params, rows):
            return term_means(magvlt_loss(merge(definition, params), rows, None, options=options))["loss"]

        return jax.jit(loss).lower(params, batch(TEXT_TO_IMAGE)).compile().cost_analysis()["flops"]

    none, mixsel = flops(unroll_weight=0.0, mixsel_weight=0.0), flops(unroll_weight=0.0)
    assert mixsel > 1.8 * none
    assert flops(unroll_mask="nested") > 1.4 * mixsel


@pytest.mark.parametrize("targets", [0, 4])
@pytest.mark.parametrize("unroll", [0.0, 1.0])
def test_operations_of_a_step(targets, unroll, model):
    """Those of its matmuls, with the head over the codes that the loss is of."""
    options = MagvltOptions((1.0, 0.0, 0.0), image_targets=targets, unroll_weight=unroll, mixsel_weight=0.0)
    definition, params = split(model)
    rows = {name: array for name, array in batch(TEXT_TO_IMAGE).items() if unroll or name != "unroll_seeds"}
    rows = {name: array for name, array in rows.items() if not name.startswith("mixed_")}

    def loss(params):
        return term_means(magvlt_loss(merge(definition, params), rows, None, options=options))["loss"]

    counted = MAGVLT.flops(
        TINY, params, dict.fromkeys(params, "all"), {name: array.shape for name, array in rows.items()}, options
    )
    traced = matmul_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert counted.total == pytest.approx(traced, rel=0.01)


def test_counts_cost_no_pass(model):
    """Accumulation asks for the counts first, see ``train_step``."""
    definition, params = split(model)

    def terms(params, rows):
        return magvlt_loss(merge(definition, params), rows, KEY, options=MagvltOptions(task_weights=(0.0, 0.0, 1.0)))

    def flops(function):
        return jax.jit(function).lower(params, batch(BOTH)).compile().cost_analysis()["flops"]

    whole = flops(terms)
    assert flops(lambda params, rows: learned_counts(terms(params, rows))) < whole / 20


def test_dropout_comes_from_the_key_and_masks_from_the_seeds(model):
    options = MagvltOptions(unroll_weight=0.0, mixsel_weight=0.0, task_weights=(0.0, 0.0, 1.0))
    loss = jax.jit(lambda rows, key: term_means(magvlt_loss(model, rows, key, options=options))["loss"])
    rows = batch(BOTH)
    assert loss(rows, jax.random.key(1)) == loss(rows, jax.random.key(1)) != loss(rows, jax.random.key(2))
    assert loss(rows, KEY) != loss(rows | {"seeds": rows["seeds"] + 1}, KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"blank_images": 1.5},
        {"label_smoothing": 1.0},
        {"length_weight": -1.0},
        {"caption_dropout": 1.0},
        {"task_weights": (0.0, 0.0, 0.0)},
    ],
)
def test_impossible_options(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        MagvltOptions(**change)

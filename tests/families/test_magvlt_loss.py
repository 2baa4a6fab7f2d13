"""The losses: equal to the golden ones on given masks, counts by task, masks by ratio, and a model that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from magma_jax.families.magvlt.loss import (
    BOTH,
    IMAGE_TO_TEXT,
    TEXT_TO_IMAGE,
    MagvltOptions,
    magvlt_loss,
    pass_totals,
)
from magma_jax.families.magvlt.masking import draw_masks, draw_places, image_count, text_count
from magma_jax.families.magvlt.sharding import SHARDINGS
from magma_jax.models.magvlt.config import MagvltConfig
from magma_jax.models.magvlt.layout import layout_of
from magma_jax.models.magvlt.model import MagvltModel, canvas_of
from magma_jax.nn.modules import abstract, merge, split
from magma_jax.published.keymap.engine import to_ours
from magma_jax.published.magvlt_keys import transformer_table
from magma_jax.runtime.sharding import MeshConfig, make_mesh, on_mesh, parameter_shardings, place_batch
from magma_jax.storage.torch.reader import open_torch_file, state_dict
from magma_jax.training.step.terms import learned_counts, term_means
from magma_jax.training.step.train_step import init_state, make_train_step

TINY = MagvltConfig(layers=2, width=32, heads=4, image_rows=37, text_rows=53, image_positions=16, text_positions=8)
KEY = jax.random.key(0)
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
    return {
        "image": jnp.asarray(rng.integers(0, 37, (rows, 16)), jnp.int32),
        "text": jnp.asarray(rng.integers(0, 53, (rows, 8)), jnp.int32),
        "lengths": jnp.asarray(rng.integers(1, 9, rows), jnp.int32),
        "task": jnp.full(rows, task, jnp.int32),
    }


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
        np.testing.assert_array_equal(image_count(r, 16), masked[:, layout.image : layout.image + 16].sum(-1))
    if "text" in predicted:
        found = text_count(r, arrays[f"{case}/n_txt"])
        np.testing.assert_array_equal(found, masked[:, layout.text : layout.text + 8].sum(-1))


def test_all_maskable_places_are_equally_likely_and_padding_is_never_masked():
    maskable = jnp.broadcast_to(jnp.arange(6) < 4, (4000, 6))
    share = draw_places(KEY, maskable, jnp.full(4000, 2)).mean(0)
    np.testing.assert_allclose(share, [0.5] * 4 + [0, 0], atol=0.04)


def test_one_draw_masks_both_in_opposite_directions():
    lengths = jnp.full(500, 8)
    shares = {}
    for independent in (False, True):
        masks = draw_masks(KEY, lengths, 16, 8, independent=independent)
        shares[independent] = np.corrcoef(masks.image.sum(-1), masks.text.sum(-1))[0, 1]
    assert shares[False] < -0.9
    assert abs(shares[True]) < 0.2


@pytest.mark.parametrize(
    ("task", "counted"),
    [(TEXT_TO_IMAGE, {"image"}), (IMAGE_TO_TEXT, {"text", "length"}), (BOTH, {"image", "text", "length"})],
)
def test_terms_of_a_task(task, counted, model):
    terms = magvlt_loss(model, batch(task), KEY, options=MagvltOptions(length_weight=0.5))
    for name in ("image", "text", "length"):
        assert (terms[name].count > 0) == (name in counted)
        assert (terms[name].total > 0) == (name in counted)
        assert terms[f"{name}_accuracy"].weight == 0
    means = term_means(terms)
    np.testing.assert_allclose(means["loss"], means["image"] + means["text"] + 0.5 * means["length"], rtol=1e-6)


def test_counts_cost_no_pass(model):
    """Accumulation asks for the counts first, see ``train_step``."""
    definition, params = split(model)

    def terms(params, rows):
        return magvlt_loss(merge(definition, params), rows, KEY, options=MagvltOptions())

    def flops(function):
        return jax.jit(function).lower(params, batch(BOTH)).compile().cost_analysis()["flops"]

    whole = flops(terms)
    assert flops(lambda params, rows: learned_counts(terms(params, rows))) < whole / 20


def test_one_device_and_eight_give_the_same_loss(model):
    definition, params = split(model)
    rows = batch(BOTH, 8)

    def loss(params, rows):
        return term_means(magvlt_loss(merge(definition, params), rows, None, options=MagvltOptions()))

    alone = jax.jit(loss)(params, rows)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    shardings = parameter_shardings(params, mesh, SHARDINGS)
    placed = {path: jax.device_put(leaf, shardings[path]) for path, leaf in params.items()}
    found = jax.jit(on_mesh(loss, mesh))(placed, place_batch(rows, mesh, 8))
    for name, value in alone.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_dropout_and_masks_come_from_the_key(model):
    def loss(key):
        return float(term_means(magvlt_loss(model, batch(BOTH), key, options=MagvltOptions()))["loss"])

    assert loss(None) == loss(None)
    assert loss(jax.random.key(1)) == loss(jax.random.key(1)) != loss(jax.random.key(2))


def test_a_model_learns_all_tasks():
    """Five rows by heart; the step compiles once for three tasks, and parts of a batch are counted apart."""
    definition, params = split(MagvltModel(MagvltConfig(
        layers=2, width=32, heads=4, image_rows=37, text_rows=53, image_positions=16, text_positions=8,
        attention_dropout=0.0, residual_dropout=0.0,
    ), rngs=nnx.Rngs(0)))  # fmt: skip
    optimizer = optax.adam(3e-3)
    options = MagvltOptions(label_smoothing=0.0, length_weight=1.0)

    def loss(model, rows, key):
        return magvlt_loss(model, rows, key, options=options)

    step = jax.jit(make_train_step(definition, loss, optimizer, accumulate=2))
    state = init_state(params, {}, optimizer)
    history = {}
    for number in range(150):
        task = number % 3
        state, metrics = step(state, {}, batch(task), KEY)
        assert metrics["nonfinite"] == 0
        history.setdefault(task, []).append(float(metrics["loss"]))
    assert step._cache_size() == 1
    for task, losses in history.items():
        assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3]), (task, losses)


@pytest.mark.parametrize("change", [{"label_smoothing": 1.0}, {"length_weight": -1.0}])
def test_impossible_options(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        MagvltOptions(**change)

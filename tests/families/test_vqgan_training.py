"""A VQ-GAN trains in one step with its discriminator, restarts codes, resumes to the bit, is sharded and planned."""

import dataclasses
import json
import re
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from magma_jax.config import ConfigError, to_dict
from magma_jax.data.dataset import Dataset
from magma_jax.data.folder_dataset import FoldersConfig
from magma_jax.data.format.records import Sample
from magma_jax.data.openmoji.dataset import OpenmojiConfig
from magma_jax.families import open_generator, run_config
from magma_jax.families.vqgan import VQGAN
from magma_jax.families.vqgan.loss import VQGANOptions, vqgan_loss
from magma_jax.families.vqgan.model import TrainingParts, VQGANModelConfig, build
from magma_jax.models.vision.lpips import Lpips
from magma_jax.models.vision.patchgan import PatchGANConfig
from magma_jax.models.vision.vqgan import SHARDINGS as TOKENIZER_SHARDINGS
from magma_jax.models.vision.vqgan import VQGAN as Tokenizer
from magma_jax.models.vision.vqgan import VQGANS
from magma_jax.nn.modules import abstract, merge, parameter_count, split, variable_types
from magma_jax.runtime.sharding import SHARED, MeshConfig
from magma_jax.storage.model_folder import open_params, write_model_folder
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.loop import train
from magma_jax.training.monitor.writers import WatchConfig
from magma_jax.training.run import setup
from magma_jax.training.run.config import RunConfig, completed
from magma_jax.training.step.optim import Group, OptimConfig, label_parameters, with_groups
from magma_jax.training.step.terms import Term, learned_counts, objective
from magma_jax.training.step.train_step import init_state, make_train_step
from tests import tiny

ONE = jax.devices()[:1]
SIZE = 16
MODEL = VQGANModelConfig(
    image_size=SIZE,
    patch=4,
    width=32,
    multipliers=(1,),
    blocks=1,
    attention_sizes=(),
    latent_channels=32,
    code_width=48,
    codes=24,
    training=TrainingParts(discriminator=PatchGANConfig(width=8, layers=1)),
)
LOSS = VQGANOptions(gan_start=2, restart_below=0.7, usage_decay=0.5, l2=0.5)


def dataset():
    """Squares of two colours on white."""
    rng = np.random.default_rng(0)
    images = np.full((40, SIZE, SIZE, 3), 255, np.uint8)
    for image in images:
        top, left = rng.integers(0, SIZE - 6, 2)
        image[top : top + 6, left : left + 6] = rng.choice([[220, 30, 30], [40, 60, 220]])

    def batches(batch_size, seed, rows):
        source = grain.MapDataset.range(32).seed(seed).shuffle().repeat().batch(batch_size)
        return source.map(lambda numbers: {"image_rows": np.asarray(numbers)[list(rows)]}).to_iter_dataset()

    def validation_batches(split, limit, batch_size, rows):
        return [{"image_rows": np.arange(32, 40)[: min(limit, batch_size)][list(rows)]}]

    return Dataset(
        tokenizer=tiny.dataset().tokenizer,
        batches=batches,
        images=images,
        learned=range(32),
        evaluation={"validation": [Sample(row, "", "a square", "caption") for row in range(32, 40)]},
        validation_batches=validation_batches,
    )


@pytest.fixture(scope="module", autouse=True)
def squares():
    data = dataset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_dataset", lambda config: data)
        yield data


def config(**changes):
    values = RunConfig(
        model=MODEL,
        data=OpenmojiConfig(image_size=SIZE),
        optim=OptimConfig(learning_rate=1e-3, groups={"discriminator": Group(learning_rate=2e-3)}),
        loss=LOSS,
        steps=4,
        batch_size=8,
        log_every=1,
        checkpoint_every=2,
        validation=ValidationConfig(every=4),
        watch=WatchConfig(tensorboard=False, samples_every=4, samples=6),
    )
    return dataclasses.replace(values, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(VQGAN, config(), tmp_path_factory.mktemp("vqgan") / "run", ONE)


def lines(run):
    return [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_by_terms_and_logs_its_codebook(finished):
    trained = [line for line in lines(finished) if "loss" in line]
    weights = {"l1": 1, "l2": 0.5, "commitment": 1, "codebook": 0.25, "generator": 1, "discriminator": 1}
    for line in trained:
        assert line["loss"] == pytest.approx(sum(w * line[name] for name, w in weights.items()), rel=1e-5, abs=1e-6)
        assert 0 < line["codes_used"] <= 1
        assert 1 <= line["perplexity"] <= MODEL.codes
    for line in trained[:2]:
        assert line["generator"] == line["discriminator"] == line["gan_weight"] == 0
    for line in trained[2:]:
        assert line["discriminator"] > 0
        assert line["gan_weight"] > 0
    assert sum(line["restarted"] for line in trained) > 0
    assert trained[0]["learning_rate"] == pytest.approx(1e-3)
    assert trained[0]["discriminator_learning_rate"] == pytest.approx(2e-3)
    (validated,) = [line for line in lines(finished) if "validation_loss" in line]
    assert {"validation_psnr", "validation_perplexity", "validation_codes_used"} <= validated.keys()


def test_the_codebook_starts_as_means_of_patches(finished, squares):
    """White, the two colours and their borders are among the codes: the first reconstruction is good already."""
    first = next(line for line in lines(finished) if "loss" in line)
    assert first["l1"] < 0.1
    assert first["codes_used"] > 0.5
    usage = np.asarray(finished.state.statistics["usage"])
    assert usage.shape == (24,)
    assert int(finished.state.statistics["passes"]) == 4


def test_it_resumes_to_the_bit(finished, tmp_path):
    shutil.copytree(finished.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")  # it goes on after step 2
    values = config(validation=ValidationConfig(), watch=WatchConfig(tensorboard=False))
    run = train(VQGAN, values, tmp_path / "run", ONE)
    for before, after in (
        (finished.state.trainable, run.state.trainable),
        (finished.state.statistics, run.state.statistics),
    ):
        assert before.keys() == after.keys()
        for path, leaf in before.items():
            np.testing.assert_array_equal(leaf, after[path], err_msg=path)


# Two more programs; the other families' meshes are tested always.
@pytest.mark.slow
def test_eight_devices_take_the_same_steps(finished, tmp_path):
    """The second step's loss is that of a codebook whose unused codes restarted from latents of the whole batch."""
    values = config(mesh=MeshConfig(data=2, fsdp=2, model=2), steps=2, validation=ValidationConfig())
    values = dataclasses.replace(
        values, optim=dataclasses.replace(values.optim, steps=4), watch=WatchConfig(tensorboard=False)
    )
    mesh = train(VQGAN, values, tmp_path / "mesh")
    assert mesh.state.trainable["codebook/weight"].sharding.shard_shape((24, 48)) == (24, 12)
    for one, sharded in zip(lines(finished)[:2], lines(mesh), strict=True):
        assert one["restarted"] == sharded["restarted"] > 0
        assert sharded["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_run_is_opened_and_shows_pairs(finished, squares):
    tokenizer = open_generator(finished.workdir)
    codes = tokenizer.encode(squares.images[32:])
    assert codes.shape == (8, 16)
    error = np.abs(tokenizer.decode(codes).astype(int) - squares.images[32:]).mean()
    assert error < 30
    panel = np.asarray(Image.open(finished.workdir / "samples/000004.png"))
    assert panel.shape == (4 + 2 * (SIZE + 4), 4 * (2 * SIZE + 12), 3)
    np.testing.assert_array_equal(panel[4 : 4 + SIZE, 4 : 4 + SIZE], squares.images[32])
    shown = tokenizer.decode(tokenizer.encode(squares.images[32:33]))[0].astype(int)
    assert np.abs(panel[4 : 4 + SIZE, 8 + SIZE : 8 + 2 * SIZE] - shown).max() <= 1
    with pytest.raises(ConfigError, match=r"no images in a split 'test' \(its splits: validation\)"):
        VQGAN.panel(
            dataclasses.replace(finished, config=config(watch=WatchConfig(samples_split="test"))), writing=False
        )


def test_each_term_moves_parameters_of_its_own():
    """The discriminator's term moves only the discriminator, all others everything but it."""
    definition, params = split(build(MODEL, nnx.Rngs(0)))
    batch = {"images": jnp.asarray(dataset().images[:2])}
    started = params | {"passes": jnp.int32(5)}

    @jax.jit
    def gradients(params):
        def totals(floats):
            terms = vqgan_loss(merge(definition, floats, rest), batch, jax.random.key(0), options=LOSS)
            learned = {name: term for name, term in terms.items() if term.weight}
            judge = {"discriminator": learned.pop("discriminator")}
            return [objective(chosen, learned_counts(chosen)) for chosen in (judge, learned)]

        floats = {path: leaf for path, leaf in params.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
        rest = {path: leaf for path, leaf in params.items() if path not in floats}
        pull = jax.vjp(totals, floats)[1]
        return [pull([jnp.float32(judge), jnp.float32(not judge)])[0] for judge in (True, False)]

    of_both = gradients(started)
    for judge, found in zip((True, False), of_both, strict=True):
        for path, gradient in found.items():
            of_judge = path.startswith("discriminator/")
            if of_judge != judge:
                assert not np.any(gradient), path
    assert np.any(of_both[1]["decoder/conv_out/weight"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_forward_pass_may_assign_a_trained_parameter(accumulate):
    """Row 1 of a table is replaced in every pass; the step's update is added to the new value."""

    class Table(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones((3, 2)))

    def loss(model, batch, key):
        del key
        total = (model.weight[...] * batch["x"][:, None, None]).sum()
        model.weight[...] = model.weight[...].at[1].add(10.0)
        return {"loss": Term(total, jnp.int32(batch["x"].size))}

    definition, params = split(Table())
    optimizer = optax.sgd(0.5)
    step = make_train_step(definition, loss, optimizer, accumulate=accumulate)
    state, _ = step(init_state(params, {}, optimizer), {}, {"x": jnp.ones(4)}, jax.random.key(0))
    expected = np.full((3, 2), 0.5) + np.array([[0], [10 * accumulate], [0]])
    np.testing.assert_allclose(state.trainable["weight"], expected)


def test_sharding_rows_match_each_parameter_once():
    whole = dataclasses.replace(
        VQGANModelConfig(**vars(VQGANS["vqgan_f16_16384"])), training=TrainingParts(PatchGANConfig())
    )
    shapes = abstract(lambda: build(whole, nnx.Rngs(0)))[1]
    inside = {f"image_tokenizer/{path}": leaf for path, leaf in shapes.items() if not re.match("disc|usage|pass", path)}
    for paths, rows in ((shapes, VQGAN.shardings), (inside, TOKENIZER_SHARDINGS)):
        for path, leaf in paths.items():
            matching = [axes for pattern, axes in (*rows, *SHARED) if re.fullmatch(pattern, path)]
            assert len(matching) == 1, (path, matching)
            assert len(matching[0]) in (0, leaf.ndim), path


def test_counts_by_role_at_full_size():
    whole = dataclasses.replace(
        VQGANModelConfig(**vars(VQGANS["vqgan_f16_16384"])), training=TrainingParts(PatchGANConfig())
    )
    model = nnx.eval_shape(lambda: build(whole, nnx.Rngs(0)))
    shapes = split(model)[1]
    labels = label_parameters(variable_types(model), with_groups(OptimConfig(), VQGAN.roles(whole)).groups)
    counts = {
        label: parameter_count({path: shapes[path] for path in shapes if labels[path] == label})
        for label in set(labels.values())
    }
    assert counts == {"tokenizer": 76_073_859, "discriminator": 2_765_633, "statistic": 16_384 + 1 + 3 + 2 * 896}


def test_a_converted_tokenizer_is_finetuned(tmp_path):
    """A base without the parts of training; the rest starts fresh, and the codebook is the base's."""
    plain = dataclasses.replace(MODEL, training=None)
    params = split(Tokenizer(plain, rngs=nnx.Rngs(3)))[1]
    write_model_folder(tmp_path / "base", {"model": to_dict(plain)}, params)
    values = config(base=str(tmp_path / "base"), steps=1, watch=WatchConfig(tensorboard=False))
    prepared = setup.prepare_run(VQGAN, values, tmp_path / "run", ONE)
    for path, leaf in params.items():
        np.testing.assert_array_equal(prepared.params[path], leaf)
    other = dataclasses.replace(values, model=dataclasses.replace(MODEL, codes=25))
    with pytest.raises(ConfigError, match=r"base: .* holds another model \(codes differ\)"):
        setup.prepare_run(VQGAN, other, tmp_path / "other", ONE)


def test_what_does_not_fit_is_refused_in_one_line():
    def refused(message, **changes):
        with pytest.raises((ConfigError, ValueError), match=message):
            completed(VQGAN, config(**changes))

    refused("data.image_size is 128, but model.image_size is 16", data=OpenmojiConfig())
    refused("data.pack: images are not packed", data=OpenmojiConfig(image_size=SIZE, pack=2))
    folders = completed(VQGAN, config(data=FoldersConfig())).data
    assert (folders.image_size, folders.augment, folders.overlong) == (SIZE, "random_crop", "truncate")
    for message, values in (
        ("loss: l1 and l2 are both 0", {"loss": {"l1": 0.0}}),
        ("loss.restart_below must be at least 0 and below 1", {"loss": {"restart_below": 1.0}}),
        ("loss.gan_weight must not be negative", {"loss": {"gan_weight": -1.0}}),
        ("discriminator of 3 layers needs images of at least 24", {"training": {"discriminator": {}}}),
        ("a patch of 4 needs a single level and a code_width of at least 48, got 1 levels and 12", {"code_width": 12}),
        ("optim.groups.discriminator: no parameter of the model has this role", {"training": {}}),
    ):
        model = to_dict(MODEL) | {name: value for name, value in values.items() if name != "loss"}
        with pytest.raises((ConfigError, ValueError), match=message):
            run_config(
                {
                    "model": model,
                    "data": {"kind": "openmoji", "image_size": SIZE},
                    "loss": values.get("loss", {}),
                    "optim": {"groups": {"discriminator": "frozen"}},
                }
            )


def test_lpips_is_a_part_of_the_model():
    """Its weights come from the package unless the config names others; they are frozen."""
    large = dataclasses.replace(MODEL, image_size=32, training=TrainingParts(perceptual="alexnet"))
    values = config(model=large, data=OpenmojiConfig(image_size=32), optim=OptimConfig(learning_rate=1e-3))
    found = completed(VQGAN, values)
    assert found.weights == {"perceptual": "lpips_alexnet"}
    definition, shapes, types = abstract(lambda: build(large, nnx.Rngs(0)))
    labels = label_parameters(types, found.optim.groups)
    assert {label for path, label in labels.items() if path.startswith("perceptual/")} == {"frozen"}
    batch = {"images": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)}
    terms = jax.eval_shape(
        lambda params, batch, key: {
            name: term.total for name, term in vqgan_loss(merge(definition, params), batch, key, options=LOSS).items()
        },
        shapes,
        batch,
        jax.random.key(0),
    )
    assert terms["lpips"].shape == ()
    flops = VQGAN.flops(large, shapes, labels, {"images": (2, 32, 32, 3)})
    assert flops.frozen > 0
    with pytest.raises(ConfigError, match=r"model.training.perceptual: a run from a base cannot add it"):
        completed(VQGAN, dataclasses.replace(values, base="models/vqgan"))
    with pytest.raises(ValueError, match=r"perceptual: alexnet needs images of at least 31 pixels, got image_size 16"):
        dataclasses.replace(MODEL, training=TrainingParts(perceptual="alexnet"))


# One more program with a backward pass through AlexNet.
@pytest.mark.slow
def test_a_run_with_lpips(tmp_path):
    large = dataclasses.replace(
        MODEL, image_size=32, training=TrainingParts(PatchGANConfig(width=8, layers=1), "alexnet")
    )
    params = {path: np.asarray(leaf) for path, leaf in split(Lpips("alexnet", rngs=nnx.Rngs(0)))[1].items()}
    save_file(params, tmp_path / "lpips.safetensors")
    data = dataset()
    wide = dataclasses.replace(data, images=data.images.repeat(2, 1).repeat(2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_dataset", lambda config: wide)
        values = config(model=large, data=OpenmojiConfig(image_size=32), watch=WatchConfig(tensorboard=False))
        values = dataclasses.replace(values, weights={"perceptual": str(tmp_path / "lpips.safetensors")})
        run = train(VQGAN, values, tmp_path / "run", ONE)
    trained = [line for line in lines(run) if "loss" in line]
    weights = {"l1": 1, "l2": 0.5, "lpips": 1, "commitment": 1, "codebook": 0.25, "generator": 1, "discriminator": 1}
    for line in trained:
        assert line["lpips"] > 0
        assert line["loss"] == pytest.approx(sum(w * line[name] for name, w in weights.items()), rel=1e-5, abs=1e-6)
    stored = open_params(run.workdir)
    for path, leaf in params.items():
        np.testing.assert_array_equal(stored[f"perceptual/{path}"].read(), leaf)
    assert open_generator(run.workdir).encode(wide.images[:2]).shape == (2, 64)

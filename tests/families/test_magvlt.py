"""MAGVLT as a family: it learns a few drawings by heart, is opened again, draws and describes them."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax.config import ConfigError
from magma_jax.data.images import ImageInput
from magma_jax.families import open_generator
from magma_jax.families.magvlt import MAGVLT
from magma_jax.families.magvlt.options import MagvltOptions
from magma_jax.families.magvlt.panel import Panel
from magma_jax.families.magvlt.prepare import task_of
from magma_jax.families.vqgan.generator import ImageTokenizer
from magma_jax.inference.answers import AnswerOptions, ImageOptions
from magma_jax.models.magvlt.config import BASE, LARGE
from magma_jax.models.vision.vqgan import VQGANS
from magma_jax.nn.modules import abstract, parameter_count
from magma_jax.plan.chips import CHIPS, Topology
from magma_jax.plan.compilation import compile_decode
from magma_jax.plan.report import make_plan, to_text
from magma_jax.runtime.compilations import compilations_of_process
from magma_jax.runtime.sharding import SHARED, MeshConfig, make_mesh
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.loop import train
from magma_jax.training.monitor.writers import WatchConfig
from magma_jax.training.run import setup
from magma_jax.training.run.config import completed
from magma_jax.training.run.program import build_program
from magma_jax.training.step.optim import label_parameters, partition
from tests.families import magvlt_tiny
from tests.families.magvlt_tiny import MODEL, NAMES, run_config

ONE = jax.devices()[:1]
STEPS = 150


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return magvlt_tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "vqgan")


@pytest.fixture(autouse=True)
def pairs(monkeypatch):
    data = magvlt_tiny.dataset()
    monkeypatch.setattr(setup, "load_dataset", lambda config: data)


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        data = magvlt_tiny.dataset()
        patch.setattr(setup, "load_dataset", lambda config: data)
        validation = ValidationConfig(every=STEPS, split="test", samples=32)
        config = run_config(tokenizer, steps=STEPS, validation=validation)
        return train(MAGVLT, config, tmp_path_factory.mktemp("magvlt") / "run", ONE)


@pytest.fixture(scope="module")
def model(finished):
    return open_generator(finished.workdir)


@pytest.fixture(scope="module")
def codes():
    return ImageTokenizer(magvlt_tiny.TOKENIZER, magvlt_tiny.tokenizer_params()).encode(magvlt_tiny.images())


def lines(run):
    return [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(finished):
    trained = [line for line in lines(finished) if "loss" in line]
    assert len(trained) == STEPS
    for line in trained:
        assert line["loss"] == pytest.approx(line["image"] + line["text"] + line["length"], rel=1e-5)
    for name in ("image", "text"):
        seen = [line[name] for line in trained if line[name]]
        assert np.mean(seen[-5:]) < 0.6 * np.mean(seen[:3]), name
    validated = next(line for line in lines(finished) if "validation_loss" in line)
    assert validated["validation_text_accuracy"] > 0.8  # one batch, whose task is image to text


def test_tasks_are_drawn_by_their_weights(finished):
    """Batches of text to image predict no text, those of image to text no image."""
    trained = [line for line in lines(finished) if "loss" in line]
    kinds = [(bool(line["image"]), bool(line["text"])) for line in trained]
    shares = [np.mean([kind == wanted for kind in kinds]) for wanted in ((True, False), (False, True), (True, True))]
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.12)
    options = MagvltOptions()
    drawn = [task_of(draw, options) for draw in (np.arange(1000) + 0.5) / 1000]
    assert [drawn.count(task) for task in range(3)] == [800, 100, 100]
    assert {task_of(draw, MagvltOptions(task_weights=(0, 3, 0))) for draw in (0.0, 0.5, 0.999)} == {1}


def test_batches_are_what_the_step_is_compiled_for():
    """With all helper losses; for images in memory, and for codes alone."""
    loss = dataclasses.replace(magvlt_tiny.LOSS, unroll_weight=1.0, mixsel_weight=0.5, caption_dropout=0.5)
    config = completed(MAGVLT, run_config("tokenizer", loss=loss))
    program = SimpleNamespace(config=config, mesh=make_mesh(MeshConfig(), ONE))
    params = {f"image_tokenizer/{path}": leaf for path, leaf in magvlt_tiny.tokenizer_params().items()}
    shapes = MAGVLT.batch_shapes(program)
    data = magvlt_tiny.dataset()
    raw = next(iter(data.batches(8, 0, range(8))))
    found = {}
    for kind, dataset in (("images", data), ("codes", dataclasses.replace(data, images=None))):
        prepare = MAGVLT.prepare(program, dataset, params)
        given = raw if kind == "images" else raw | {"codes": found["codes"], "partner_codes": found["codes"]}
        for draw, task in ((0.1, 0), (0.6, 1), (0.9, 2)):
            found = prepare(given | {"draws": np.full((8, 2), draw, np.float32)})
            assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
                name: (shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()
            }
            assert found["task"].tolist() == [task] * 8
            if task == 0:
                assert 0 < (found["lengths"] == 1).sum() < 8  # captions that are left out
    wrong = SimpleNamespace(size=64, tokens=16)
    with pytest.raises(ConfigError, match="hold 16 codes an image, of 64, but the model has 16 of 32"):
        MAGVLT.prepare(program, SimpleNamespace(images=None, codes=wrong, tokenizer=data.tokenizer), params)


def test_the_tokenizer_is_frozen(finished, model):
    frozen = partition(finished.program.params, finished.program.labels)[1]
    assert set(frozen) == {f"image_tokenizer/{path}" for path in magvlt_tiny.tokenizer_params()}
    for path, leaf in magvlt_tiny.tokenizer_params().items():
        np.testing.assert_array_equal(model.image_tokenizer.params[path], leaf)


def test_it_draws_what_it_learned(model, codes):
    assert model.makes == {"text", "image", "edit"}
    for row, name in enumerate(NAMES):
        drawn = model.draw([name], ImageOptions(temperature=(0.5, 0.1), candidates=2))
        np.testing.assert_array_equal(drawn.codes[0], codes[row], err_msg=name)
        assert drawn.images[0].size == (16, 16)
    images = model.generate_image(NAMES[0], n=2, steps=2)
    assert [image.size for image in images] == [(16, 16)] * 2


def test_candidates_are_chosen_by_a_given_score(model):
    """Of images by the brightness of the first pixel, of texts by their length; both are asked about all candidates."""
    asked = []

    def brightness(images, texts):
        asked.append(texts)
        return np.array([float(np.asarray(image)[0, 0].sum()) for image in images])

    options = {"temperature": (3.0, 3.0), "steps": 4}
    every = model.draw([NAMES[0]], ImageOptions(n=4, **options))
    best = model.draw([NAMES[0]], ImageOptions(candidates=4, score=brightness, **options))
    values = brightness(every.images, [])
    np.testing.assert_array_equal(best.codes[0], every.codes[int(values.argmax())])
    assert best.scores[0] == values.max()
    assert asked[0] == [NAMES[0]] * 4
    picture = ImageInput(Image.fromarray(magvlt_tiny.images()[1]))
    said = []

    def longest(images, texts):
        assert [image.size for image in images] == [(16, 16)] * 4
        said.extend(texts)
        return np.array([*map(len, texts)])

    assert model.caption(picture, candidates=4, lengths=4, score=longest) == [max(said, key=len)]


def test_it_describes_what_it_learned(model):
    pictures = [ImageInput(Image.fromarray(image)) for image in magvlt_tiny.images()]
    assert [model.caption(picture)[0] for picture in pictures] == list(NAMES)
    assert model.infill_text(pictures[1], "a red [MASK] of France") == [NAMES[1]]
    found = list(model.answers([[picture] for picture in pictures[:2]], AnswerOptions(n=2)))
    assert [[answer.text for answer in answers] for answers in found] == [[name] * 2 for name in NAMES[:2]]
    assert found[0][0].finish == "stop"
    assert model.caption(pictures[0], candidates=2, lengths=2) == [NAMES[0]]


def test_inpainting_keeps_codes(model, codes):
    picture = ImageInput(Image.fromarray(magvlt_tiny.images()[0]))
    mask = np.zeros((16, 16), bool)
    mask[:5, :4] = True  # of two cells of 4 x 4, the second by a row of pixels
    drawn = model.draw([picture, NAMES[1]], ImageOptions(n=2, mask=mask))
    changed = [0, 4]
    kept = [place for place in range(16) if place not in changed]
    np.testing.assert_array_equal(drawn.codes[0][kept], codes[0][kept])
    assert model.inpaint(picture, mask, NAMES[1], n=2)[0].size == (16, 16)


def test_canvases_end_with_the_answer(model):
    options = ImageOptions(n=2, steps=4, seed=5)
    seen = list(model.canvases([NAMES[2]], options, previews=2))
    assert [canvas.finish for canvas in seen] == [None, None, "stop"]
    assert [len(canvas.images) for canvas in seen] == [2, 2, 2]
    assert (np.asarray(seen[0].images[0]) == 128).all(-1).any()
    (answers,) = model.answers([[NAMES[2]]], options)
    for answer, image in zip(answers, seen[-1].images, strict=True):
        np.testing.assert_array_equal(np.asarray(answer.parts[0]), np.asarray(image))
    next_seed = model.draw([NAMES[2]], ImageOptions(steps=4, seed=6, n=2), trace=4)
    np.testing.assert_array_equal(np.asarray(next_seed.images[0]), np.asarray(answers[1].parts[0]))
    assert next_seed.trace.masked.shape == (4, 2, 16)


def test_the_panel_shows_drawings_and_texts(finished, model):
    watch = WatchConfig(tensorboard=False, samples=2, samples_split="test")
    run = dataclasses.replace(finished, config=dataclasses.replace(finished.config, watch=watch))
    params = model.model.params | {
        f"image_tokenizer/{path}": leaf for path, leaf in model.image_tokenizer.params.items()
    }
    panel = Panel(run, writing=True)(STEPS, params)
    assert panel.shape[1:] == (1200, 3)
    assert (finished.workdir / f"samples/{STEPS:06d}.png").exists()
    written = [json.loads(line) for line in (finished.workdir / "samples.jsonl").read_text().splitlines()]
    assert [(line["truth"], line["said"]) for line in written] == [(NAMES[0], NAMES[0]), (NAMES[3], NAMES[3])]
    absent = dataclasses.replace(run.config, watch=dataclasses.replace(watch, samples_split="none"))
    without = dataclasses.replace(run, config=absent)
    with pytest.raises(ConfigError, match="no images to describe in split 'none'"):
        Panel(without, writing=False)


def test_pairs(model):
    ((image, text),) = model.generate_pair(seed=1, steps=6)
    assert image.size == (16, 16)
    assert text


def test_changed_options_compile_nothing(model):
    def ask(**options):
        model.generate_image(NAMES[0], n=2, **options)
        model.caption(ImageInput(Image.fromarray(magvlt_tiny.images()[0])), seed=options.get("seed", 0))

    ask()
    counter = compilations_of_process()
    before = counter.count
    ask(steps=7, temperature=(0.3, 0.2), guidance=2.5, top_p=0.9, seed=8)
    assert counter.count == before


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([""], {}, "the prompt is empty; say what the image shows"),
        (["a"] * 2, {}, "the prompt has 0 images and 2 texts"),
        (["a " * 20], {}, "the text has [0-9]+ tokens, more than 10"),
        (["a"], {"mask": np.ones((16, 16), bool)}, "a mask marks the pixels of an image; give the image too"),
        ([0, "a"], {"mask": np.ones((8, 16), bool)}, "the mask has 16 x 8 pixels, but the image 16 x 16"),
        ([0, "a"], {"mask": np.zeros((16, 16), bool)}, "the mask keeps everything"),
        ([0], {}, "the prompt has no text"),
        (["a"], {"n": 0}, "n must be at least 1"),
        (["a"], {"steps": 0}, "steps must be at least 1"),
        (["a"], {"guidance": -1.0}, "guidance must be"),
        (["a"], {"places": "best"}, "places 'best' is none of multinomial-maskgit"),
    ],
)
def test_refused_drawings(model, prompt, options, message):
    image = ImageInput(Image.fromarray(magvlt_tiny.images()[0]))
    with pytest.raises(ValueError, match=message):
        model.draw([image if part == 0 else part for part in prompt], ImageOptions(**options))


def test_refused_texts(model):
    image = ImageInput(Image.fromarray(magvlt_tiny.images()[0]))
    with pytest.raises(ValueError, match=r"has no \[MASK\]"):
        model.infill_text(image, "a cat")
    with pytest.raises(ValueError, match="the prompt has no image to describe"):
        next(model.answers([["a cat"]], AnswerOptions()))
    with pytest.raises(ValueError, match="leave out beams, choices and stop"):
        next(model.answers([[image]], AnswerOptions(beams=2)))


def test_it_resumes_to_the_bit(finished, tokenizer, tmp_path):
    """From the step before the last ones, in the middle of an epoch."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / f"run/checkpoints/{STEPS}")
    validation = ValidationConfig(every=STEPS, split="test", samples=32)
    resumed = train(MAGVLT, run_config(tokenizer, steps=STEPS, validation=validation), tmp_path / "run", ONE)
    for path, leaf in finished.state.trainable.items():
        np.testing.assert_array_equal(leaf, resumed.state.trainable[path], err_msg=path)


def test_a_step_of_drawing_is_planned(tokenizer):
    config = run_config(tokenizer, mesh=MeshConfig(fsdp=8))
    program = build_program(MAGVLT, config, make_mesh(config.mesh))
    topology = Topology("v5e:2x4", CHIPS["v5e"], tuple(jax.devices()))
    plan = make_plan(program, topology, compile_decode(program, 8), "generate", 8)
    assert plan.fits
    matrices = sum(leaf.size for path, leaf in program.params.items() if re.match("layers/", path) and leaf.ndim > 2)
    # Eight images on eight devices: each runs one image, twice with guidance.
    assert plan.costs.flops > 2 * 2 * matrices * (MODEL.image_positions + MODEL.text_positions)
    assert "steps of an image/s over all rows" in to_text(plan)
    with pytest.raises(ConfigError, match="--slots: this model sees whole images and has no cache"):
        compile_decode(program, 8, 64)


@pytest.mark.parametrize(("config", "learning"), [(BASE, 371_533_056), (LARGE, 795_228_672)], ids=["base", "large"])
def test_full_size(config, learning):
    config = dataclasses.replace(config, tokenizer=VQGANS["vqgan_f16_16384"])
    _, shapes, types = abstract(lambda: MAGVLT.build(config, nnx.Rngs(0)))
    trained, frozen, _ = partition(shapes, label_parameters(types, MAGVLT.roles(config)))
    assert (parameter_count(trained), parameter_count(frozen)) == (learning, 76_073_859)
    for path in shapes:
        assert len([row for row, _ in (*MAGVLT.shardings, *SHARED) if re.fullmatch(row, path)]) == 1, path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, "weights.image_tokenizer: the model's image tokenizer is frozen"),
        ({"data": dataclasses.replace(run_config("x").data, length=7)}, "data.length is 7, but the model has 10"),
        ({"model": dataclasses.replace(MODEL, tokenizer=None)}, "data of images need a model with an image tokenizer"),
    ],
)
def test_refused_configs(tokenizer, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(MAGVLT, run_config(tokenizer, **changes), tmp_path / "run", ONE)


def test_a_tokenizer_of_other_codes_is_refused():
    with pytest.raises(ValueError, match="image_rows is 64, but the image tokenizer has 32"):
        dataclasses.replace(MODEL, image_rows=64)

"""CM3Leon as a family: it trains, resumes, is sharded, planned and opened again, and draws what it has learned."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from magma_jax.config import ConfigError
from magma_jax.convert.__main__ import main as convert
from magma_jax.data.dataset import Dataset
from magma_jax.data.documents.document import Image as ImagePart
from magma_jax.data.documents.document import RetrievedDocuments, Text
from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig
from magma_jax.data.documents.settings import block_batches, held_out_documents
from magma_jax.data.documents.spans import SpanConfig
from magma_jax.data.images import ImageInput
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.families import open_generator, open_token_generator
from magma_jax.families.cm3leon import CM3LEON
from magma_jax.families.cm3leon.generator import Codes, Hidden
from magma_jax.families.cm3leon.loading import read_cm3leon
from magma_jax.families.cm3leon.options import DrawOptions
from magma_jax.inference.answers import AnswerOptions, ImageOptions
from magma_jax.inference.generator import ImageGenerator
from magma_jax.inference.image_queue import ImageQueue
from magma_jax.inference.pending import UnfinishedError
from magma_jax.models.cm3leon import CM3LEON_SIZES, CM3LeonConfig, CM3LeonModel
from magma_jax.models.vision.vqgan import VQGAN, VQGANS, VQGANConfig
from magma_jax.nn.modules import abstract, merge, parameter_count, split
from magma_jax.plan.chips import CHIPS, Topology
from magma_jax.plan.compilation import compile_decode
from magma_jax.plan.report import make_plan
from magma_jax.runtime.sharding import SHARED, MeshConfig, make_mesh
from magma_jax.storage.model_folder import CheckpointError
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.loop import train
from magma_jax.training.monitor.writers import WatchConfig
from magma_jax.training.run import setup
from magma_jax.training.run.config import RunConfig, completed
from magma_jax.training.run.program import build_program
from magma_jax.training.step.optim import Group, OptimConfig, label_parameters

ONE = jax.devices()[:1]
COLOURS = {"red": (220, 30, 30), "blue": (40, 60, 220)}
SIDE, GRID = 8, 16
TOKENIZER = VQGANConfig(
    image_size=SIDE,
    width=32,
    multipliers=(1, 1),
    blocks=1,
    attention_sizes=(),
    latent_channels=8,
    code_width=8,
    codes=64,
)
TEXTS = ["plain red", "half red", "plain blue", "half blue"]
BPE = train_bpe([f"a {text} square" for text in TEXTS] * 4, 280)
LAYOUT = VocabLayout(text=BPE.vocab_size, image=64, sentinels=8)
MODEL = CM3LeonConfig(
    layers=2,
    width=64,
    heads=4,
    feed_forward=128,
    vocab_rows=LAYOUT.rows,
    vocabulary=LAYOUT,
    context_length=96,
    embedding_std=0.05,
    image_tokens=GRID,
    tokenizer=TOKENIZER,
)


def drawings():
    images = np.zeros((len(TEXTS), SIDE, SIDE, 3), np.uint8)
    for row, text in enumerate(TEXTS):
        kind, colour = text.split()
        images[row] = COLOURS[colour]
        if kind == "half":
            images[row, :, SIDE // 2 :] = 0
    return images


def dataset(config):
    layout, image_tokens = config.layout()
    images = drawings()
    pairs = [
        (
            Text(np.array(BPE.encode(f"a {text} square"))),
            ImagePart(np.arange(row * image_tokens, (row + 1) * image_tokens)),
        )
        for row, text in enumerate(TEXTS)
    ]
    documents = RetrievedDocuments(
        queries=pairs * 64,  # Grain shuffles few numbers slowly
        layout=dataclasses.replace(layout, image=len(images) * image_tokens),
        image_tokens=image_tokens,
        retrieved=0,
    )
    return Dataset(
        tokenizer=BPE,
        batches=block_batches(documents, config),
        images=images,
        validation_batches=held_out_documents({"train": documents, "test": documents}, config.length),
    )


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    monkeypatch.setattr(setup, "load_dataset", dataset)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """An image tokenizer; a random one has codes that tell the drawings apart."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    params = jax.jit(lambda: split(VQGAN(TOKENIZER, rngs=nnx.Rngs(0)))[1])()
    save_file({name: np.asarray(leaf) for name, leaf in params.items()}, path)
    return str(path)


def run_config(tokenizer_file, **changes):
    config = RunConfig(
        model=MODEL,
        weights={"image_tokenizer": tokenizer_file},
        # One document a block, and mostly whole texts and images are moved: captions are learned quickly.
        data=OpenmojiDocumentsConfig(length=32, spans=SpanConfig(rotation=0.8)),
        optim=OptimConfig(learning_rate=4e-3, clip_norm=1.0, steps=200),
        steps=200,
        batch_size=16,
        log_every=1,
        checkpoint_every=200,
        validation=ValidationConfig(every=100, split="test", samples=8),
        watch=WatchConfig(tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(tokenizer_file, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_dataset", dataset)
        return train(CM3LEON, run_config(tokenizer_file), tmp_path_factory.mktemp("cm3leon") / "run", ONE)


@pytest.fixture(scope="module")
def model(finished):
    return open_generator(finished.workdir)


@pytest.fixture(scope="module")
def codes(model):
    """The codes of all drawings."""
    return model.images.encode(drawings())


def lines(run):
    return [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]


def test_image_and_text_loss_fall(finished):
    trained = [line for line in lines(finished) if "loss" in line]
    assert len(trained) == 200
    for name in ("loss", "image_loss", "text_loss"):
        assert trained[-1][name] < 0.5 * trained[0][name]
    assert trained[-1]["image_loss"] < 0.5
    assert trained[-1]["skipped_samples"] == 0
    validated = [line for line in lines(finished) if "validation_loss" in line]
    assert [line["step"] for line in validated] == [100, 200]
    assert {"validation_image_loss", "validation_text_loss"} <= validated[0].keys()


def test_it_draws_what_it_has_learned(model, codes):
    texts = [f"a {text} square" for text in TEXTS]
    drawn = model.draw_codes(texts, DrawOptions(temperature=(0.0, 0.0)))
    np.testing.assert_array_equal(np.concatenate(drawn), codes)
    images = model.generate_image("a half red square", n=2, guidance=1.5, temperature=0.0)
    assert [image.size for image in images] == [(SIDE, SIDE)] * 2
    red = TEXTS.index("half red")
    np.testing.assert_array_equal(np.asarray(images[1]), model.images.decode(codes[red][None])[0])
    settings = model.sampler(ImageOptions(temperature=(0.5, 0.5), guidance=2))
    assert (settings["steps"], settings["temperature"], settings["guidance"][-3:]) == (len(codes[red]), 0.5, "= 2")


def test_a_score_of_image_and_text_chooses_among_candidates(model):
    options = DrawOptions(temperature=(1.0, 1.0), candidates=2, n=2)
    asked = []

    def score(images, texts):
        asked.extend(zip(texts, (image.size for image in images), strict=True))
        return np.array([0.0, 1.0] * 4)

    prompts = [["a half red square"], ["a plain blue square"]]
    found = list(model.answers(prompts, dataclasses.replace(options, score=score)))
    assert asked == [(text, (SIDE, SIDE)) for (text,) in prompts for _ in range(4)]
    every = list(model.answers(prompts, dataclasses.replace(options, candidates=1, n=4)))
    for chosen, all_ in zip(found, every, strict=True):
        for one, second in zip(chosen, all_[1::2], strict=True):
            np.testing.assert_array_equal(np.asarray(one.parts[0]), np.asarray(second.parts[0]))
    wrong = dataclasses.replace(options, n=1, score=lambda images, texts: [np.nan, 1.0])
    with pytest.raises(ValueError, match=r"score gives \[nan, 1.0\] for 2 images; it must give a number for each"):
        next(model.answers(prompts[:1], wrong))


def test_a_served_request_among_others_equals_a_single_one(model):
    """Guided drawings, one without guidance and an edit share a running batch; a completed image is drawn alone."""
    guided = ImageOptions(guidance=2.0, temperature=(1.0, 1.0), seed=3)
    plain = dataclasses.replace(guided, guidance=1)
    image = ImageInput(Image.fromarray(drawings()[1]))
    mask = np.broadcast_to(np.arange(SIDE) < SIDE // 2, (SIDE, SIDE))
    asked = [(["a half red square"], dataclasses.replace(guided, n=2)), (["a plain blue square"], guided)]
    asked += [([image, "a plain red square"], guided), (["a half blue square"], plain)]
    asked += [([image, "a half red square"], dataclasses.replace(plain, mask=mask))]
    with ImageQueue(model, slots=5) as queue:
        tickets = [queue.submit(prompt, options) for prompt, options in asked]
        found = [list(ticket)[-1].images for ticket in tickets]
        with pytest.raises(UnfinishedError, match="a drawing needs a text"):
            list(queue.submit([" "], guided))
    for (prompt, options), images in zip(asked, found, strict=True):
        alone = [answer.parts[0] for answer in next(model.answers([prompt], options))]
        np.testing.assert_array_equal(np.stack(images), np.stack(alone))
    with pytest.raises(ValueError, match="2 slots are fewer than the 3 of an edit"):
        ImageQueue(model, slots=2)


def test_it_draws_the_same_in_8_bits(finished, model, codes, tmp_path, capsys):
    folder = tmp_path / "int8"
    assert convert(["quantize", str(finished.workdir), str(folder)]) == 0
    small = open_generator(folder)
    assert small.config.dtype == "int8"
    stored = {path: leaf.dtype.name for path, leaf in small.params.items()}
    assert {dtype for path, dtype in stored.items() if path.endswith("_proj/weight")} == {"int8"}
    assert stored["wte/weight"] == stored["layers/mlp/c_fc/weight_scale"] == "float32"
    for path in ("wte/weight", "image_tokenizer/codebook/weight"):
        np.testing.assert_array_equal(small.params[path], model.params[path])
    texts = [f"a {text} square" for text in TEXTS]
    np.testing.assert_array_equal(np.concatenate(small.draw_codes(texts, DrawOptions(temperature=(0.0, 0.0)))), codes)
    # Others than matrices may be had in bfloat16; scales stay.
    half = read_cm3leon(folder, "bfloat16")[1]
    assert half["wte/weight"].dtype == jnp.bfloat16
    assert half["layers/mlp/c_fc/weight_scale"].dtype == jnp.float32
    capsys.readouterr()
    assert convert(["quantize", str(folder), str(tmp_path / "again")]) == 2
    assert "its language model is in int8 already" in capsys.readouterr().err
    assert convert(["to-torch", str(folder), str(tmp_path / "out.pt")]) == 2
    assert "its matrices are in int8, which no published layout has" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="weights in int8 are made by python -m magma_jax"):
        open_generator(finished.workdir, dtype="int8")


def test_it_describes_completes_and_answers(model, codes):
    """All of these see what was memorised: its text, its codes."""
    blue = TEXTS.index("plain blue")
    image = Image.fromarray(drawings()[blue])
    assert model.caption(Codes(codes[blue]), max_new_tokens=16) == "a plain blue square"
    mask = np.zeros((SIDE, SIDE), bool)
    mask[SIDE // 2 :] = True
    filled = model.infill(["a plain blue square", Hidden(image, mask)])
    assert filled[0] == "a plain blue square"
    np.testing.assert_array_equal(np.asarray(filled[1]), model.images.decode(codes[blue][None])[0])
    assert model.makes == {"text", "image", "edit"}
    likeliest = ImageOptions(temperature=(0.0, 0.0), n=2)
    prompts = [["a plain blue square"], [ImageInput(image), "a plain blue square"]]
    drawn, edited = model.answers(prompts, likeliest)
    assert [answer.finish for answer in drawn + edited] == ["stop"] * 4
    np.testing.assert_array_equal(np.asarray(drawn[0].parts[0]), np.asarray(filled[1]))
    assert drawn[0].logprob < 0
    assert isinstance(model, ImageGenerator)
    (canvas,) = model.canvases(prompts[0], likeliest, previews=2)
    np.testing.assert_array_equal(np.asarray(canvas.images[1]), np.asarray(filled[1]))
    completed = next(model.answers([prompts[1]], dataclasses.replace(likeliest, mask=mask)))
    np.testing.assert_array_equal(np.asarray(completed[0].parts[0]), np.asarray(filled[1]))
    (said,) = next(model.answers([[ImageInput(image)]], AnswerOptions(max_new_tokens=16)))
    assert said.parts == ("a plain blue square",)
    assert said.finish == "stop"
    # A text is continued, by images too.
    (answer,) = next(model.answers([["a plain blue square"]], AnswerOptions(max_new_tokens=18)))
    assert answer.parts[0].size == (SIDE, SIDE)


def short(tokenizer_file, **changes):
    changes = {"steps": 4, "checkpoint_every": 2, "validation": ValidationConfig()} | changes
    return run_config(tokenizer_file, **changes)


@pytest.fixture(scope="module")
def four_steps(tokenizer_file, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_dataset", dataset)
        return train(CM3LEON, short(tokenizer_file), tmp_path_factory.mktemp("four") / "run", ONE)


def test_it_resumes_to_the_bit_amid_an_epoch(four_steps, tokenizer_file, tmp_path):
    train(CM3LEON, short(tokenizer_file, steps=2), tmp_path / "run", ONE)
    resumed = train(CM3LEON, short(tokenizer_file), tmp_path / "run", ONE)
    for path, leaf in four_steps.state.trainable.items():
        np.testing.assert_array_equal(leaf, resumed.state.trainable[path])
    assert not any(path.startswith("image_tokenizer/") for path in four_steps.state.trainable)


def test_eight_devices_and_parts_of_a_batch_give_the_same_loss(four_steps, tokenizer_file, tmp_path):
    changes = {"steps": 1, "mesh": MeshConfig(data=2, fsdp=2, model=2), "accumulate": 2}
    sharded = train(CM3LEON, short(tokenizer_file, **changes), tmp_path / "mesh")
    first, second = (next(line for line in lines(run) if "loss" in line) for run in (four_steps, sharded))
    for name in ("loss", "image_loss", "text_loss"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)
    assert len(sharded.state.trainable["wte/weight"].sharding.device_set) == 8


def test_padding_does_not_matter(model):
    tokens = np.full((2, 12), LAYOUT.pad, np.int32)
    tokens[:, :6] = [LAYOUT.eos, *LAYOUT.from_text(np.arange(5))]
    tokens[1, 6:] = LAYOUT.image_ids.start
    module = merge(model.graphdef, model.params)
    hidden = module(module.embed(jnp.asarray(tokens))).hidden
    np.testing.assert_array_equal(hidden[0, :6], hidden[1, :6])


def test_one_sharding_row_matches_every_parameter():
    config = dataclasses.replace(
        CM3LEON_SIZES["cm3leon-7b"], tokenizer=VQGANS["vqgan_f8_8192"], vocabulary=VocabLayout()
    )
    shapes, types = abstract(lambda: CM3LeonModel(config, rngs=nnx.Rngs(0)))[1:]
    rows = [*CM3LEON.shardings, *SHARED]
    for path in shapes:
        assert sum(bool(re.fullmatch(pattern, path)) for pattern, _ in rows) == 1, path
    groups = label_parameters(types, CM3LEON.roles(config))
    assert {group for path, group in groups.items() if path.startswith("image_tokenizer/")} == {"frozen"}
    assert parameter_count({path: leaf for path, leaf in shapes.items() if groups[path] != "frozen"}) == 6_727_671_808


def test_it_is_planned(tokenizer_file):
    config = short(tokenizer_file, mesh=MeshConfig(fsdp=8))
    program = build_program(CM3LEON, config, make_mesh(config.mesh))
    shapes = {name: shape for name, (shape, _) in CM3LEON.batch_shapes(program).items()}
    assert shapes == {"tokens": (16, 33), "labels": (16, 33)}
    flops = CM3LEON.flops(MODEL, program.params, program.labels, shapes)
    decoder = sum(math.prod(leaf.shape) for path, leaf in program.params.items() if path.startswith("layers/"))
    assert flops.trained == 16 * 32 * 6 * (decoder + MODEL.vocab_rows * MODEL.width)
    assert flops.attention == 16 * 12 * 32**2 * 64 * 2
    assert flops.frozen == flops.encoder == 0
    topology = Topology("v5e:2x4", CHIPS["v5e"], tuple(jax.devices()))
    assert make_plan(program, topology, compile_decode(program, 16), "generate", 16).fits


def test_it_is_no_model_of_texts_alone(finished, capsys):
    with pytest.raises(CheckpointError, match="a cm3leon model does not write text token by token; give a checkpoint"):
        open_token_generator(finished.workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weights": {}},
            "weights.image_tokenizer: the model's image tokenizer is frozen, so it needs",
        ),
        ({"data": OpenmojiDocumentsConfig(length=640)}, "data.length 640 exceeds model.context_length 96"),
        ({"data": OpenmojiDocumentsConfig(length=64, image_tokens=9)}, "data.image_tokens is 9, but the model's is 16"),
        (
            {"optim": OptimConfig(groups={"tokenizer": Group()})},
            "optim.groups.tokenizer: batches hold codes, so the image tokenizer cannot learn here",
        ),
        (
            {"model": dataclasses.replace(MODEL, dtype="int8")},
            "model.dtype: the decoder learns, which it cannot in int8",
        ),
        (
            {"model": dataclasses.replace(MODEL, tokenizer=None)},
            "data.kind openmoji_documents has images, not codes: set model.tokenizer",
        ),
    ],
)
def test_configs_that_do_not_fit(changes, message, tokenizer_file):
    with pytest.raises(ConfigError, match=re.escape(message)):
        completed(CM3LEON, run_config(tokenizer_file, **changes))


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="image_tokens is 20, but the tokenizer's grid has 16 codes"):
        dataclasses.replace(MODEL, image_tokens=20)
    with pytest.raises(ValueError, match=r"vocabulary\.image is 60, but the tokenizer has 64 codes"):
        dataclasses.replace(MODEL, vocabulary=dataclasses.replace(LAYOUT, image=60))
    with pytest.raises(ValueError, match=r"data\.retrieved: pairs are retrieved beforehand; set data\.annotation"):
        OpenmojiDocumentsConfig(retrieved=2)

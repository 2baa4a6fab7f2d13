"""The command line that draws."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax.config import to_dict
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.generate.__main__ import main
from magma_jax.generate.images import read_mask
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.nn.modules import abstract
from magma_jax.storage.model_folder import write_model_folder
from tests.families.magvlt_tiny import MODEL, NAMES, tokenizer_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "magvlt"
    shapes = abstract(lambda: MagvltModel(MODEL, rngs=nnx.Rngs(0)))[1]
    rng = np.random.default_rng(0)
    params = {path: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    params |= {f"image_tokenizer/{path}": np.asarray(leaf) for path, leaf in tokenizer_params().items()}
    words = train_bpe(list(NAMES), 300)
    write_model_folder(folder, {"model": to_dict(MODEL)}, params, lambda path: words.save(path / "tokenizer"))
    return str(folder)


@pytest.fixture
def files(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    Image.new("L", (20, 20), 0).save(tmp_path / "nothing.png")
    hole = Image.new("RGBA", (20, 20), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (0, 0, 4, 4))
    hole.save(tmp_path / "hole.png")
    Image.new("RGB", (30, 20), "white").save(tmp_path / "wide.png")
    return tmp_path


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def size(path):
    with Image.open(path) as image:
        return image.size


def test_images_of_a_text_and_of_an_image(folder, files, capsys):
    out = files / "out.png"
    draw = ("--checkpoint", folder, "--make", "image", "--steps", "3", "--output", out)
    status, said, err = run(capsys, *draw, "--prompt", NAMES[0], "--n", "2")
    assert (status, err) == (0, "")
    assert [line.split("\t")[0] for line in said.splitlines()] == [str(files / f"out-{i}.png") for i in (1, 2)]
    assert size(files / "out-1.png") == (16, 16)
    (files / "out-1.png").unlink()
    assert run(capsys, *draw, files / "red.png", NAMES[1], "--mask", files / "hole.png", "--n", "2")[0] == 0
    assert size(files / "out-1.png") == (16, 16)
    status, said, _ = run(capsys, "--checkpoint", folder, files / "red.png")
    assert status == 0
    assert said.count("\n") == 1


def test_masks_mark_transparent_or_light_pixels(files):
    hole = read_mask(str(files / "hole.png"))
    assert hole.sum() == 16
    assert hole[:4, :4].all()
    assert read_mask(str(files / "wide.png")).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a cat"], "--make image needs --output FILE.png"),
        (["a cat", "--output", "{}/out.jpg"], "give a name that ends in .png"),
        (["a cat", "--output", "{}/out.png", "--memory", "{}"], "reads no documents; leave it out"),
        (["a cat", "--output", "{}/no/out.png"], "no such folder; make it first"),
        ([" ", "--output", "{}/out.png"], "the prompt is empty; say what the image shows"),
        (["--output", "{}/out.png"], "the prompt is empty; say what the image shows"),
        (["a cat", "--output", "{}/out.png", "--steps", "0"], "steps must be at least 1, got 0"),
        (["a cat", "--output", "{}/out.png", "--n", "513", "--candidates", "2"], "are more than 1024 images of one"),
        (["a cat", "--output", "{}/out.png", "--cd-k", "4"], "is guided by guidance alone: leave out cd_k"),
        (["a cat", "--output", "{}/out.png", "--contrasted", "1"], "contrasted 1: give cd_k"),
        (["a cat", "--output", "{}/out.png", "--beams", "2"], "--beams is for texts"),
        (["a cat", "--output", "{}/out.png", "--places", "best"], "places 'best' is none of"),
        (["a cat", "--output", "{}/out.png", "--mask", "{}/hole.png"], "marks pixels of one image; 0 are given"),
        (["{}/red.png", "a cat", "--output", "{}/out.png", "--mask", "{}/nothing.png"], "the mask keeps everything"),
        (["{}/red.png", "a cat", "--output", "{}/out.png", "--mask", "{}/wide.png"], "the mask has 30 x 20 pixels"),
        (["{}/red.png", "a cat", "--output", "{}/red.png"], "is one of the inputs; give another name"),
        (["a " * 30, "--output", "{}/out.png"], "tokens, more than 10"),
        (["\N{CJK UNIFIED IDEOGRAPH-65E5}" * 9, "--output", "{}/out.png"], "tokens, more than 10"),
    ],
)
def test_bad_input_is_one_line(folder, files, arguments, message, capsys):
    given = [argument.replace("{}", str(files)) for argument in arguments]
    status, out, err = run(capsys, "--checkpoint", folder, "--make", "image", *given)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (files / "out.png").exists()

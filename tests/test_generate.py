"""The command line that captions a picture."""

import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax import generate
from magma_jax.config import to_dict
from magma_jax.data.images import ImageInput
from magma_jax.inference.api import Magma
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from magma_jax.training.model_folder import write_model_folder
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    params = split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1]
    tokenizer = tiny.dataset().tokenizer
    metadata = {"model": to_dict(tiny.MODEL)}
    write_model_folder(folder, metadata, params, lambda path: tokenizer.save(path / "tokenizer"))
    return str(folder)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "square.png"
    Image.new("RGB", (70, 60), "red").save(path)
    return str(path)


def run(capsys, *arguments):
    status = generate.main(arguments)
    return status, *capsys.readouterr()


def test_one_picture_gives_one_line_the_same_as_from_python(folder, picture, capsys):
    status, out, err = run(capsys, "--checkpoint", folder, "--max-new-tokens", "6", picture)
    model = Magma.from_checkpoint(folder)
    expected = model.generate(model.preprocess_inputs([ImageInput(picture), "A picture of"]), 6, temperature=0.0)[0]
    assert (status, err) == (0, "")
    assert out == " ".join(expected.split()) + "\n"


def test_several_pictures_and_a_prompt(folder, picture, tmp_path, capsys):
    other = tmp_path / "blue.jpg"
    Image.new("RGB", (64, 64), "blue").save(other)
    options = ("--checkpoint", folder, "--max-new-tokens", "4", "--temperature", "1", "--top-k", "20", "--seed", "3")
    status, out, _ = run(capsys, *options, picture, str(other), "Q: What colour is it? A:")
    assert status == 0
    assert [line.split(": ")[0] for line in out.splitlines()] == [picture, str(other)]
    assert run(capsys, *options, picture, str(other), "Q: What colour is it? A:")[1] == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "missing.png: no such file"),
        (["{picture}", "missing.png"], "missing.png: no such file"),
        (["{page}"], "no image in one of the formats"),
        (["{empty}"], "the file is empty"),
        (["{picture}", "  "], "the prompt is empty"),
        (["https://example.org/a.png"], "images by URL are not enabled"),
        (["{picture}", "--max-new-tokens", "0"], "max_steps must be at least 1"),
        (["{picture}", "--max-new-tokens", "99"], "the context holds 64"),
        (["{picture}", "--top-p", "2"], "top_p must lie between 0 and 1"),
        (["{picture}", "--checkpoint", "{nothing}"], "not a model folder"),
    ],
)
def test_errors_are_one_line_and_status_2(folder, picture, tmp_path, capsys, arguments, message):
    page, empty = tmp_path / "page.png", tmp_path / "empty.png"
    page.write_text("<html>")
    empty.write_bytes(b"")
    names = {"picture": picture, "page": page, "empty": empty, "nothing": tmp_path / "nothing"}
    arguments = [argument.format(**names) for argument in arguments]
    status, out, err = run(capsys, "--checkpoint", folder, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_prompt_may_be_longer_than_a_file_name(folder, picture, capsys):
    status, _, err = run(capsys, "--checkpoint", folder, picture, "a " * 3000)
    assert status == 2
    assert "the context holds" in err


@pytest.mark.slow
def test_as_a_program(folder, picture):
    command = [sys.executable, "-m", "magma_jax.generate", "--checkpoint", folder, "--max-new-tokens", "3"]
    good = subprocess.run([*command, picture], capture_output=True, text=True)
    assert good.returncode == 0
    assert good.stdout.count("\n") == 1
    bad = subprocess.run([*command, "nothing.png"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr == "error: nothing.png: no such file\n"


def test_transparency_and_odd_sizes_are_taken(folder, tmp_path, capsys):
    path = tmp_path / "odd.png"
    Image.fromarray(np.zeros((3, 200, 4), np.uint8)).save(path)
    assert run(capsys, "--checkpoint", folder, "--max-new-tokens", "2", str(path))[0] == 0

"""The command line that captions an image."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax import Magma
from magma_jax.config import to_dict
from magma_jax.data.images import ImageInput
from magma_jax.generate.__main__ import main
from magma_jax.generate.questions import read_inputs
from magma_jax.inference.answer_file import AnswerFile
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from magma_jax.storage.model_folder import write_model_folder
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
def image(tmp_path):
    path = tmp_path / "square.png"
    Image.new("RGB", (70, 60), "red").save(path)
    return str(path)


def run(capsys, *arguments):
    status = main(arguments)
    return status, *capsys.readouterr()


def test_one_image_gives_one_line_the_same_as_from_python(folder, image, capsys):
    status, out, err = run(capsys, "--checkpoint", folder, "--max-new-tokens", "6", image)
    model = Magma.from_checkpoint(folder)
    expected = model.generate(model.preprocess_inputs([ImageInput(image), "A picture of"]), 6, temperature=0.0)[0]
    assert (status, err) == (0, "")
    assert out == " ".join(expected.split()) + "\n"


def test_several_images_and_a_prompt(folder, image, tmp_path, capsys):
    other = tmp_path / os.fsdecode(b"bl\xfcue.jpg")  # not UTF-8
    Image.new("RGB", (64, 64), "blue").save(other)
    options = ("--checkpoint", folder, "--max-new-tokens", "4", "--temperature", "1", "--top-k", "20", "--seed", "3")
    status, out, _ = run(capsys, *options, image, str(other), "Q: What colour is it? A:")
    assert status == 0
    assert [line.split(": ")[0] for line in out.splitlines()] == [image, str(tmp_path / "bl\\xfcue.jpg")]
    assert run(capsys, *options, image, str(other), "Q: What colour is it? A:")[1] == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "missing.png: No such file or directory"),
        (["{image}", "missing.png"], "missing.png: No such file or directory"),
        (["{page}"], "no image in one of the formats"),
        (["{empty}"], "the file is empty"),
        (["{image}", "  "], "the prompt is empty"),
        (["https://example.org/a.png"], "images by URL are not enabled"),
        (["{image}", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["{image}", "--max-new-tokens", "99"], "the context holds 64"),
        (["{image}", "--top-p", "2"], "top_p must lie between 0 and 1"),
        (["{image}", "--checkpoint", "{nothing}"], "not a model folder"),
        (["{folder}"], "a folder needs --output"),
        (["Look:", "{folder}", "--output", "{nothing}"], "put it first, followed by one text"),
        (["{page}", "{empty}", "--stream"], "for one prompt and one answer"),
        (["{image}", "--stream", "--choices", "red"], "leave out --beams and --choices"),
        (["{image}", "--beams", "2", "--choices", "red"], "leave one of them out"),
        (["{image}", "--beams", "2", "--temperature", "1"], "a beam search draws nothing"),
        (["{image}", "--beams", "2", "--n", "3"], "n must lie between"),
        (["{image}", "--n", "0"], "n must be at least 1"),
        (["{image}", "--choices", "red", " "], "an empty answer"),
        (["{image}", "--attention", "{image}"], "is one of the inputs"),
        (["{image}", "--attention", "a.jpg"], "ends in .png"),
        (["{image}", "--attention", "{nothing}/a.png"], "no such folder"),
        (["a text", "--attention", "a.png"], "needs an image"),
        (["{image}", "--head", "1"], "give layer too"),
        (["{image}", "--attention", "{out}", "--layer", "99"], "layer 99: the model has 2, counted from 0"),
        (["{image}", "--attention", "{out}", "--layer", "0", "--head", "-1"], "head -1: the model has 2"),
        (["{image}", "--seed", "99999999999999999999"], "seed must be a whole number from -2**63"),
        (["{image}", "--seed", "18446744073709551615", "--n", "2"], "seed must be a whole number"),
        (["{image}", "--output", "{page}"], "already exists"),
        (["{image}", "--output", "{nothing}/a.jsonl"], "no such folder"),
    ],
)
def test_errors_are_one_line_and_status_2(folder, image, tmp_path, capsys, arguments, message):
    page, empty = tmp_path / "page.png", tmp_path / "empty.png"
    page.write_text("<html>")
    empty.write_bytes(b"")
    names = {"image": image, "page": page, "empty": empty, "nothing": tmp_path / "nothing", "folder": tmp_path}
    names |= {"out": tmp_path / "out.png"}
    arguments = [argument.format(**names) for argument in arguments]
    status, out, err = run(capsys, "--checkpoint", folder, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_hidden_images_of_a_folder_are_left_out_and_counted(tmp_path, capsys):
    for name in ("b.png", "a/c.jpg", "._b.png", ".ipynb_checkpoints/b.png", "__MACOSX/a/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"an image, never opened")
    (tmp_path / "folder.png").mkdir()
    questions = read_inputs([str(tmp_path), "A picture of"])
    assert [question.name for question in questions] == [str(tmp_path / "a" / "c.jpg"), str(tmp_path / "b.png")]
    assert capsys.readouterr().err == f"note: {tmp_path}: 3 hidden files are left out\n"
    assert len(read_inputs([str(tmp_path / "._b.png"), "A picture of"])) == 1  # asked for by name


def test_a_prompt_may_be_longer_than_a_file_name(folder, image, capsys):
    status, _, err = run(capsys, "--checkpoint", folder, image, "a " * 3000)
    assert status == 2
    assert "more than the context of 64 tokens holds" in err


def test_inputs_in_another_order_are_one_prompt(folder, image, capsys):
    model = Magma.from_checkpoint(folder)
    items = ["It is", image, "Q: What? A:"]
    expected = model.generate(model.preprocess_inputs(["It is", ImageInput(image), "Q: What? A:"]), 5, 0.0)[0]
    status, out, _ = run(capsys, "--checkpoint", folder, "--max-new-tokens", "5", *items)
    assert (status, out) == (0, " ".join(expected.split()) + "\n")
    prompt = [ImageInput(image), ImageInput(image), "a"]
    expected = model.generate(model.preprocess_inputs(prompt), 5, 0.0)[0]
    status, out, _ = run(capsys, "--checkpoint", folder, "--max-new-tokens", "5", image, image, "a", "--together")
    assert (status, out) == (0, " ".join(expected.split()) + "\n")


def test_a_stream_shows_the_same_text_and_attention_its_words(folder, image, tmp_path, capsys):
    options = ("--checkpoint", folder, "--max-new-tokens", "6", image, "A picture of")
    whole = run(capsys, *options)[1]
    drawn = tmp_path / "attention.png"
    status, out, err = run(capsys, *options, "--stream", "--attention", str(drawn), "--layer", "1", "--head", "0")
    assert (status, " ".join(out.split())) == (0, whole.strip())
    assert "the encoder's attention mixes" in err
    with Image.open(drawn) as sheet:
        assert sheet.width == 12 + 460 * min(4, len(out.split()))


def test_choices_and_beams(folder, image, capsys):
    options = ("--checkpoint", folder, image, "Q: What colour is it? A:")
    status, out, _ = run(capsys, *options, "--choices", "red", "green", "blue")
    found = [line.split("\t") for line in out.splitlines()]
    assert (status, {text for text, _ in found}) == (0, {"red", "green", "blue"})
    shares = [float(share) for _, share in found]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=2e-4)
    status, out, _ = run(capsys, *options, "--beams", "3", "--n", "2", "--max-new-tokens", "4")
    assert (status, out.count("\n")) == (0, 2)


class Stopped(Exception):
    """What comes over a run."""


def test_a_folder_becomes_a_file_and_an_interrupted_run_goes_on(folder, tmp_path, capsys, monkeypatch):
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for name, colour in (("b.png", "blue"), ("a.png", "red"), ("more/c.jpg", "green"), ("d.webp", "white")):
        Image.new("RGB", (64, 64), colour).save(images / name)
    (images / "broken.png").write_text("<html>")
    (images / "notes.txt").write_text("no image")
    out, other = tmp_path / "answers.jsonl", tmp_path / "other.jsonl"
    options = ("--checkpoint", folder, "--max-new-tokens", "3", str(images), "A picture of", "--output")
    assert run(capsys, *options, str(out), "--max-new-tokens", "99")[0] == 2  # nothing written, nothing to finish
    status, printed, err = run(capsys, *options, str(out))
    assert (status, printed, err) == (1, "", "1 of 5 images could not be read; their lines say why\n")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["a.png", "b.png", "broken.png", "d.webp", "more/c.jpg"]
    assert [record["picture"] for record in records] == [str(images / name) for name in names]
    assert "no image in one of the formats" in records[2]["error"]
    assert records[0].keys() == {"picture", "prompt", "text", "logprob", "finish_reason"}

    def stop(self, record):
        if record["picture"].endswith("d.webp"):
            self._file.write(b'{"half a line')
            raise Stopped
        write(self, record)

    write = AnswerFile.write
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write", stop)
        with pytest.raises(Stopped):
            run(capsys, *options, str(other))
    assert not other.exists()
    status, _, err = run(capsys, *options, str(other), "--seed", "1")
    assert (status, "with another prompt or other options" in err) == (2, True)
    # The first images are not asked again: without them the rest still comes.
    (images / "a.png").write_text("")
    assert run(capsys, *options, str(other))[0] == 0
    assert other.read_text() == out.read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_as_a_program(folder, image):
    command = [sys.executable, "-m", "magma_jax.generate", "--checkpoint", folder, "--max-new-tokens", "3"]
    good = subprocess.run([*command, image], capture_output=True, text=True)
    assert good.returncode == 0
    assert good.stdout.count("\n") == 1
    bad = subprocess.run([*command, "nothing.png"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr == "magma_jax.generate: nothing.png: No such file or directory\n"


def test_transparency_and_odd_sizes_are_taken(folder, tmp_path, capsys):
    path = tmp_path / "odd.png"
    Image.fromarray(np.zeros((3, 200, 4), np.uint8)).save(path)
    assert run(capsys, "--checkpoint", folder, "--max-new-tokens", "2", str(path))[0] == 0

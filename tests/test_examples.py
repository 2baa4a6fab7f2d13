"""The scripts in examples/ do on tiny inputs what they say."""

import functools
import importlib.util
import json
import socket
from pathlib import Path

import jax
import pytest
from flax import nnx
from PIL import Image

from magma_jax.config import to_dict
from magma_jax.convert.magma_checkpoint import to_safetensors
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from magma_jax.storage.model_folder import write_model_folder
from tests import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    params = split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1]
    tokenizer = tiny.dataset().tokenizer
    write_model_folder(folder, {"model": to_dict(tiny.MODEL)}, params, lambda path: tokenizer.save(path / "tokenizer"))
    return str(folder)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in tiny.COLOURS.items():
        Image.new("RGB", (80, 64), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} square\n")
    return folder


def test_captions_of_a_folder(model, images, tmp_path, capsys):
    example("caption_folder").main([model, str(images), str(tmp_path / "captions.json")])
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert sorted(captions) == sorted(f"{name}.png" for name in tiny.COLOURS)
    assert all(text.startswith("A picture of") for text in captions.values())
    assert len(set(captions.values())) > 1
    assert "left out: " in capsys.readouterr().out  # the text files


def test_training_on_images_of_ones_own(model, images, tmp_path, monkeypatch, capsys):
    script = example("train_on_your_images")
    monkeypatch.setattr(script, "train", functools.partial(script.train, devices=jax.devices()[:1]))
    arguments = [str(images), str(tmp_path / "run"), "--base", model, "--steps", "2", "--batch-size", "4"]
    script.main(arguments)
    assert "blue.png: A picture of" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2


@pytest.mark.slow  # a server compiles more than all other examples together
def test_a_checkpoint_is_converted_and_served(model, images, tmp_path, capfd):
    to_safetensors(model, tmp_path / "tiny.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    script = example("convert_and_serve")
    folder = tmp_path / "converted"
    script.main(
        [str(tmp_path / "tiny.safetensors"), str(folder), str(images / "red.png"), "A", "--port", port, "--once"]
    )
    assert (folder / "model.json").is_file()
    out, err = capfd.readouterr()
    assert f"serving converted on http://127.0.0.1:{port}" in err
    assert out.strip()


@pytest.mark.slow
def test_the_notebook_writes_the_same_model_in_200_lines(capsys):
    cells = json.loads((EXAMPLES / "magma_in_200_lines.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(bool(line.strip()) for source in sources for line in source.splitlines()) <= 200
    assert not any(cell.get("outputs") for cell in cells)
    scope = {}
    for source in sources:
        exec(compile(source, "magma_in_200_lines.ipynb", "exec"), scope)
    printed = capsys.readouterr().out
    difference = float(printed.partition("largest difference of the logits: ")[2].split()[0])
    assert difference < 1e-3
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] / 2

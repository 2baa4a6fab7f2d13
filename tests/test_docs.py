"""The Python blocks of the documentation run as they stand."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from flax import nnx
from PIL import Image

from magma_jax.config import load_config_file, settings, to_dict
from magma_jax.families import run_config
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from magma_jax.storage.model_folder import write_model_folder
from tests import tiny

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.mark.slow
def test_blocks_of_inference(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # More layers and heads than elsewhere: the examples name some.
    lm = dataclasses.replace(tiny.MODEL.lm, layers=4, heads=8, rotary_dim=2)
    config = dataclasses.replace(tiny.MODEL, lm=lm)
    params = split(MagmaModel(config, rngs=nnx.Rngs(0)))[1]
    tokenizer = tiny.dataset().tokenizer
    folder = Path("runs/quickstart")
    folder.parent.mkdir()
    write_model_folder(folder, {"model": to_dict(config)}, params, lambda path: tokenizer.save(path / "tokenizer"))
    Image.new("RGB", (90, 64), "red").save("image.png")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "inference.md").read_text(), re.S)
    for block in blocks:
        exec(compile(block, "inference.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "(2, 20) (2, 20) (2, 20, 5)" in printed
    assert re.search(r"\(4, 8, \d+, 1, 4\)\n\(5, 1, \d+, 32\)", printed)
    with Image.open("all_words.png") as sheet:
        assert sheet.width > sheet.height / 10


def test_two_walks_print_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", (DOCS / "walks.md").read_text(), re.S)
    assert len(blocks) > 10
    scope = {}
    for code, printed in blocks:
        exec(compile(code, "walks.md", "exec"), scope)
        assert capsys.readouterr().out == printed, code


def test_every_setting_is_in_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    page = importlib.import_module("config_reference").reference()
    assert (DOCS / "settings.md").read_text() == page, "run python scripts/config_reference.py"
    names = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    for config in ("quickstart", "own_data", "magvlt_quickstart", "cm3leon_quickstart", "vqgan_quickstart", "magma_v2"):
        for line in settings(run_config(load_config_file(config))):
            assert line.partition("=")[0].rpartition(".")[2] in names | MAPPED, line
    # Links within the page have a place.
    places = {heading.lower() for heading in re.findall(r"^## (\w+)$", page, re.M)}
    assert set(re.findall(r"\]\(#(\w+)\)", page)) <= places


# Keys of mappings, which are no fields.
MAPPED = {"adapter", "encoder", "head", "language", "prefix", "tokenizer", "transformer"}
MAPPED |= {"train", "validation", "test", "lm", "image_prefix/encoder", "codes", "image_tokenizer", "perceptual"}


@pytest.mark.parametrize("page", ["house.md", "walks.md"])
def test_pages_name_files_that_exist(page):
    names = re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\w+\.py)`", (DOCS / page).read_text())
    assert len(names) > 10
    for name in names:
        assert (ROOT / "magma_jax" / name).exists() or (ROOT / name).exists(), name


def test_the_picture_of_the_house_is_that_of_its_rooms(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    house = importlib.import_module("house_image")
    assert (DOCS / "house.svg").read_text() == house.draw(), "run python scripts/house_image.py"

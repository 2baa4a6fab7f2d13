"""The Python blocks of the documentation run as they stand."""

import dataclasses
import re
from pathlib import Path

import pytest
from flax import nnx
from PIL import Image

from magma_jax.config import to_dict
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from magma_jax.storage.model_folder import write_model_folder
from tests import tiny

DOCS = Path(__file__).parent.parent / "docs"


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

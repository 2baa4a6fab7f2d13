"""``python -m magma_jax.data tokenizer``: the same file from the same texts, whole or not at all."""

import os

import pytest
from tokenizers import Tokenizer as Backend

from magma_jax.data.__main__ import main
from magma_jax.data.tokenizers.byte_level import Tokenizer
from tests.data.test_tokenizer import CORPUS


@pytest.fixture
def texts(tmp_path):
    half = len(CORPUS) // 2
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, lines in zip(files, (CORPUS[:half], CORPUS[half:]), strict=True):
        file.write_bytes("\r\n".join([*lines, "na\u00efve"]).encode())
    return [str(file) for file in files]


def test_the_file_depends_on_the_texts_alone(texts, tmp_path, capsys):
    outs = [tmp_path / "one.json", tmp_path / "new" / "two.json"]
    assert main(["tokenizer", *texts, str(outs[0]), "--vocab-size", "290"]) == 0
    assert main(["tokenizer", *reversed(texts), str(outs[1]), "--vocab-size=290"]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert f"{outs[0]}: 290 entries" in capsys.readouterr().out
    tokenizer = Tokenizer.load(outs[0])
    assert len(tokenizer) == 290
    text = "a blue truck on the \u6771\u4eac road"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # The format is that of the ``tokenizers`` library.
    assert Backend.from_file(str(outs[0])).encode(CORPUS[0]).ids == tokenizer.encode(CORPUS[0])
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_bad_input_is_one_line_and_leaves_no_file(texts, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"good\ncaf\xe9\n")
    out = tmp_path / "out.json"
    for arguments, message in [
        ([str(tmp_path / "latin.txt"), str(out)], "latin.txt: line 2 is not UTF-8"),
        ([str(tmp_path / "absent.txt"), str(out)], "absent.txt: No such file"),
        ([str(tmp_path), str(out)], "is not a regular file"),
        ([*texts, str(out)], "entries, not 56320; give more text or --vocab-size"),
        ([*texts, str(out), "--vocab-size=200"], "vocab_size 200 is below 258"),
        ([*texts, str(tmp_path)], "is a folder; give the file to write"),
        ([texts[0]], "the following arguments are required: out"),
    ]:
        try:
            status = main(["tokenizer", *arguments])
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr().err
        assert (status, said.count("\n")) == (2, 1), said
        assert message in said
        assert not out.exists()

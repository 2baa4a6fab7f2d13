"""Sums of model folders: a changed file is noticed on whatever way it is read, and folders without sums still open."""

import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest

from magma_jax.convert.__main__ import main
from magma_jax.convert.check_folder import add_checksums
from magma_jax.storage import array_files, model_folder
from magma_jax.storage.checksums import SUMS_FILE
from magma_jax.storage.model_folder import (
    BASE,
    CheckpointError,
    base_reference,
    open_params,
    read_model_json,
    read_params,
    write_model_folder,
)

PARAMS = {
    "lm/layers/weight": np.arange(4 * 64 * 64, dtype=np.float32).reshape(4, 64, 64),
    "lm/wte/weight": np.ones((64, 64), np.float16),
    "n": np.int32(7),
}
SHAPES = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in PARAMS.items()}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(array_files, "CHUNK_NBYTES", 64 * 64 * 2)
    monkeypatch.setattr(array_files, "_ROW_NBYTES", 64)
    model_folder._say_unchecked.cache_clear()


@pytest.fixture
def folder(tmp_path):
    def extras(folder):
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")

    write_model_folder(tmp_path / "model", {"model": {"width": 64}}, PARAMS, extras)
    return tmp_path / "model"


def zeros(path):
    """As a disk or a copy may leave it: the same size, and no error on reading."""
    path.write_bytes(bytes(path.stat().st_size))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_FILE and path.read_bytes())


def parts(folder, name):
    return sorted(path for path in (folder / "params").glob(f"*/{name}/*") if not path.name.startswith("."))


def read_everything(folder):
    return {path: tensor.read() for path, tensor in open_params(folder).items()}


def test_sha256sum_reads_the_list(folder):
    listed = (folder / SUMS_FILE).read_text().splitlines()
    assert len(listed) > len(files(folder)) > 12  # some are empty
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS_FILE], cwd=folder, check=True)
    assert read_params(folder, SHAPES).keys() == PARAMS.keys()
    assert read_everything(folder).keys() == PARAMS.keys()


@pytest.mark.parametrize("damage", [zeros, lambda path: path.unlink(), lambda path: path.write_bytes(b"{")])
def test_no_file_changes_unnoticed(folder, tmp_path, damage):
    for i, path in enumerate(files(folder)):
        copy = tmp_path / str(i)
        shutil.copytree(folder, copy)
        name = path.relative_to(folder).as_posix()
        damage(copy / name)
        for read in (lambda copy=copy: read_params(copy, SHAPES), lambda copy=copy: read_everything(copy)):
            with pytest.raises(CheckpointError) as caught:
                read_model_json(copy) and read()
            assert name in str(caught.value) or name == "model.json"
            assert "\n" not in str(caught.value)
        assert main(["verify", str(copy), "--checksums"]) == (1 if (copy / "model.json").exists() else 2)


def test_a_row_is_compared_when_it_is_read_and_no_other(folder):
    zeros(parts(folder, "lm.layers.weight")[-1])
    stack = open_params(folder)["lm/layers/weight"]
    assert len(stack.rows) == 4
    np.testing.assert_array_equal(stack.rows[2].read(), PARAMS["lm/layers/weight"][2])
    with pytest.raises(CheckpointError, match=r"lm\.layers\.weight/3\.\d.* has changed since it was written"):
        stack.rows[3].read()
    with pytest.raises(CheckpointError, match="has changed"):
        stack.read()
    # What nobody asks for is not read.
    assert read_params(folder, {"n": SHAPES["n"]})["n"] == 7


def test_a_list_that_lacks_files(folder, tmp_path):
    lines = (folder / SUMS_FILE).read_text().splitlines(keepends=True)
    for kept in (lines[:-3], []):
        (folder / SUMS_FILE).write_text("".join(kept))
        with pytest.raises(CheckpointError, match=f"{SUMS_FILE} does not list params/"):
            read_params(folder, SHAPES)
        assert main(["verify", str(folder), "--checksums"]) == 1
    for name, message in (
        ("../../etc/passwd", "not a file of this folder"),
        ("/etc/passwd", "not a file of this folder"),
    ):
        (folder / SUMS_FILE).write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(CheckpointError, match=message):
            read_params(folder, SHAPES)
    (folder / SUMS_FILE).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8 text"):
        read_params(folder, SHAPES)


def test_the_base_of_a_run_is_compared_too(folder, tmp_path, capsys):
    own = {"n": PARAMS["n"]}
    write_model_folder(tmp_path / "run", {"model": {}, BASE: base_reference(folder, tmp_path / "run", folder)}, own)
    assert read_params(tmp_path / "run", SHAPES).keys() == PARAMS.keys()
    assert main(["verify", str(tmp_path / "run"), "--checksums"]) == 0
    zeros(parts(folder, "lm.wte.weight")[0])
    with pytest.raises(CheckpointError, match=rf"{folder}: params/.*lm\.wte\.weight/0\.0 has changed"):
        read_params(tmp_path / "run", SHAPES)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run"), "--checksums", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["folders"][str(tmp_path / "run")] == []
    assert [line.split("/")[2] for line in found["folders"][str(folder)]] == ["lm.wte.weight"]


def test_a_folder_without_sums_opens_with_a_line_and_gets_them(folder, capsys):
    (folder / SUMS_FILE).unlink()
    for _ in range(2):
        read_params(folder, SHAPES)
        read_everything(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"add it with python -m magma_jax.convert add-checksums {folder}")
    assert main(["verify", str(folder), "--checksums"]) == 2
    (folder / "metrics.jsonl").write_text("grows with the run")
    assert main(["add-checksums", str(folder)]) == 0
    (folder / "metrics.jsonl").write_text("more")
    assert main(["verify", str(folder), "--checksums"]) == 0
    with pytest.raises(CheckpointError, match="already exists; to accept the current files"):
        add_checksums(folder)
    zeros(parts(folder, "n")[0])
    with pytest.raises(CheckpointError, match="has changed"):
        read_params(folder, SHAPES)


def test_what_orbax_lays_out_by_default_can_be_listed(folder):
    import orbax.checkpoint.experimental.v1 as ocp

    from magma_jax.nn.modules import nest

    shutil.rmtree(folder / "params")
    ocp.save(folder / "params", nest(PARAMS | {"n": np.array(7, np.int32)}))
    (folder / SUMS_FILE).unlink()
    add_checksums(folder)
    assert read_params(folder, SHAPES).keys() == PARAMS.keys()
    largest = max(files(folder / "params"), key=lambda path: path.stat().st_size)
    zeros(largest)
    with pytest.raises(CheckpointError, match=f"{largest.name} has changed"):
        read_params(folder, SHAPES)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder that leads out"])
def test_nothing_but_files_is_read(folder, tmp_path, kind, sums):
    if not sums:
        (folder / SUMS_FILE).unlink()
    (path,) = parts(folder, "n")
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        (tmp_path / "secret").write_bytes(bytes(4))
        path.symlink_to(tmp_path / "secret")
    else:
        path = path.parent
        shutil.rmtree(path)
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    for read in (lambda: read_params(folder, SHAPES), lambda: read_everything(folder)):
        with pytest.raises(CheckpointError, match=f"{path}: is a link, pipe or device"):
            read()

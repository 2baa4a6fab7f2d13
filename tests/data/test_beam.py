"""Conversion by Apache Beam: the same files, to the byte; skipped where Beam is not installed."""

import functools
import importlib.util
import subprocess
import sys

import pytest

from magma_jax.data.format.records import DataError
from magma_jax.data.readers import read
from magma_jax.data.write.beam import convert_with_beam
from magma_jax.data.write.conversion import ConvertOptions, convert
from tests import datafolders

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed (extra `beam`)"
)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.jpg").write_bytes(datafolders.noise(i))
        (folder / f"{i}.txt").write_text(f"image {i}\n")
    (folder / "3.jpg").write_bytes(b"")
    return folder


def run(*arguments):
    # A process of its own: importing Beam warns, which would fail the tests.
    command = [sys.executable, "-m", "magma_jax.data", "convert", "--from", "folder", "--runner", "beam"]
    return subprocess.run([*command, "--shard-records", "2", *map(str, arguments)], capture_output=True, text=True)


@needs_beam
@pytest.mark.slow
def test_a_pipeline_writes_the_files_of_the_converter(images, tmp_path):
    options = ConvertOptions(shard_records=2, workers=0, max_skipped=0.5)
    source = {"format": "folder", "file": "images"}
    convert(read("folder", images), tmp_path / "local", options, source=source)
    done = run(images, tmp_path / "beam", "--max-skipped", 0.5)
    assert done.returncode == 0, done.stderr
    assert "left out: 1 x image empty" in done.stdout
    local, beam = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("local", "beam"))
    assert local == beam


@needs_beam
@pytest.mark.slow
def test_an_error_of_a_pipeline_is_one_line(images, tmp_path):
    done = run(images, tmp_path / "beam")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("magma_jax.data: 1 of 7 samples would be left out (1 x image empty)")
    done = run(tmp_path / "nowhere", tmp_path / "other")
    assert "nowhere: no such folder" in done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Apache Beam is installed")
def test_without_beam_it_is_said_how_to_get_it(images, tmp_path):
    with pytest.raises(DataError, match=r"--runner beam needs Apache Beam: pip install 'magma_jax\[beam\]'"):
        convert_with_beam(functools.partial(read, "folder", images), tmp_path / "beam")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]

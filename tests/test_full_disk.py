"""A disk that gets full while something is written: one line, and nothing half written stays.

A limit on the size of files, which is a real error of the system at a write of the test's choice.
"""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.convert.__main__ import main
from magma_jax.output import OutputError, raise_if_full, replace_file, whole_output
from magma_jax.storage.model_folder import CheckpointError, write_model_folder
from magma_jax.training.checkpoints.checkpoint import CHECKPOINTS, RunCheckpoints, Snapshot
from magma_jax.training.step.train_step import TrainState

CASE = "none"


@contextlib.contextmanager
def largest_file(nbytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_conversions(golden, golden_checkpoint, tmp_path, capsys):
    source = [str(golden_checkpoint(CASE)), str(tmp_path / "model"), "--model-config", str(golden / f"{CASE}.json")]
    with largest_file(40_000):
        assert main(["from-torch", *source]) == 2
    assert names(tmp_path) == []
    said = capsys.readouterr().err
    assert main(["from-torch", *source]) == 0
    for command in ("to-torch", "to-safetensors", "to-hf"):
        with largest_file(40_000):
            assert main([command, str(tmp_path / "model"), str(tmp_path / "out")]) == 2
        assert names(tmp_path) == ["model"]
    said += capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("magma_jax.convert:")]
    places = [tmp_path / "model", *[tmp_path / "out"] * 3]
    assert lines == [
        f"magma_jax.convert: {place}: the disk is full (File too large); free some space or choose another disk"
        for place in places
    ]


def test_a_model_folder_of_many_parts(tmp_path):
    params = {f"a{i}": np.ones(50_000, np.float32) for i in range(40)}
    with largest_file(100_000), pytest.raises(CheckpointError, match="model: the disk is full"):
        write_model_folder(tmp_path / "model", {"model": {}}, params)
    assert names(tmp_path) == []


def test_a_checkpoint(tmp_path, capfd):
    def snapshot(step, size):
        trainable = {"w": jnp.asarray(np.random.default_rng(0).random(size, np.float32))}
        return Snapshot(TrainState(jnp.int32(step), trainable, {}, {"m": jnp.zeros(2)}), jax.random.key(0), {})

    checkpoints = RunCheckpoints(tmp_path, writing=True)
    checkpoints.save(snapshot(1, 10))
    checkpoints.close()
    checkpoints = RunCheckpoints(tmp_path, writing=True)
    with largest_file(100_000):
        checkpoints.save(snapshot(2, 100_000))
        with pytest.raises(CheckpointError, match=r"checkpoints/2: the disk is full \(File too large\)"):
            checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err
    with RunCheckpoints(tmp_path, writing=True) as checkpoints:
        assert checkpoints.result_step() == 1
    assert names(tmp_path / CHECKPOINTS) == ["1"]


def test_results(tmp_path):
    (tmp_path / "x").write_text("old")
    with largest_file(1000), pytest.raises(OutputError, match="x: the disk is full"):
        replace_file(tmp_path / "x", bytes(2000))
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]

    def write():
        with whole_output(tmp_path / "y") as partial:
            partial.write_bytes(bytes(2000))

    with largest_file(1000), pytest.raises(OutputError, match="y: the disk is full"):
        write()
    assert names(tmp_path) == ["x"]


def test_what_is_another_error(tmp_path):
    raise_if_full(tmp_path, OSError(13, "Permission denied"))
    raise_if_full(tmp_path, KeyboardInterrupt())
    with pytest.raises(OutputError, match="No space left"):
        raise_if_full(tmp_path, ValueError("RESOURCE_EXHAUSTED: Error writing x: No space left on device [source ...]"))

"""One writer of a run folder: refused while the other lives, taken over when it is gone, on any kind of shared disk."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from magma_jax.storage.model_folder import CheckpointError
from magma_jax.training.checkpoints import run_lock
from magma_jax.training.checkpoints.checkpoint import RunCheckpoints, Snapshot
from magma_jax.training.checkpoints.run_lock import LOCK_FILE, RunLock
from magma_jax.training.step.train_step import TrainState
from tests import tiny


@contextlib.contextmanager
def holder(workdir):
    """Another process that has the folder."""
    arguments = [sys.executable, "-m", "tests.training.holder", str(workdir)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch):
    """Beats and patience of tests."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)
    monkeypatch.setattr(run_lock, "WATCH_S", 0.5)
    monkeypatch.setattr(run_lock, "POLL_S", 0.01)


def snapshot(step):
    trainable = {"lm/layers/attn/q_proj/weight": jnp.full((2, 4), step)}
    return Snapshot(TrainState(jnp.int32(step), trainable, {}, {"m": jnp.zeros(2)}), jax.random.key(step), {})


def left(workdir):
    return [path.name for path in workdir.iterdir() if path.name.startswith(LOCK_FILE)]


def written_by(workdir, **changes):
    """A lock as a process that does not live here has written it."""
    there = run_lock.myself() | {"token": "00", "host": "far", "process": 7} | changes
    (workdir / "another").write_text(f"{json.dumps(there)}\n{0:010d}\n")
    os.replace(workdir / "another", workdir / LOCK_FILE)


def test_a_second_process_is_refused_and_a_killed_one_replaced(tmp_path, capsys):
    with RunCheckpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(snapshot(1))
    assert left(tmp_path) == []
    with holder(tmp_path) as process:
        half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
        half.mkdir()  # what the holder is saving
        with pytest.raises(CheckpointError) as caught:
            RunCheckpoints(tmp_path, writing=True)
        assert f"{tmp_path}: process {process.pid} on '" in str(caught.value)
        assert half.is_dir()
        with RunCheckpoints(tmp_path) as reader:
            assert reader.latest_step() == 1
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        with RunCheckpoints(tmp_path, writing=True) as checkpoints:
            checkpoints.save(snapshot(2))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}: taken over from process {process.pid} on '")
    assert line.endswith("which is gone")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert left(tmp_path) == []


def test_a_process_that_ends_gives_the_folder_free(tmp_path, capsys):
    with holder(tmp_path) as process:
        process.communicate("")
        assert process.returncode == 0
    RunLock(tmp_path).release()
    assert capsys.readouterr().err == ""


def test_training_in_a_folder_that_is_being_trained_stops_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("magma_jax.training.run.setup.load_dataset", lambda config: tiny.dataset())
    tiny.train(tiny.run_config(steps=1), tmp_path / "run")
    monkeypatch.setattr("magma_jax.training.run.setup.load_dataset", lambda config: pytest.fail("loads data"))
    before = sorted(tmp_path.rglob("*"))
    with holder(tmp_path / "run"), pytest.raises(CheckpointError, match="is writing this run; wait for it"):
        tiny.train(tiny.run_config(steps=2), tmp_path / "run")
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != LOCK_FILE] == before


@pytest.mark.usefixtures("quick")
def test_on_another_machine_a_beat_tells(tmp_path, capsys, monkeypatch):
    lock = RunLock(tmp_path)
    monkeypatch.setattr(run_lock, "_machine", lambda: "another")
    with pytest.raises(CheckpointError, match="is writing this run"):
        RunLock(tmp_path)
    assert "waiting up to" in capsys.readouterr().err
    lock.release()
    written_by(tmp_path, machine="a third")
    RunLock(tmp_path).release()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].split(" process")[0] for line in lines] == ["held by", "taken over from"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"x" * 10**6, b'{"process": "1", "machine": 3}'])
def test_a_lock_that_tells_nothing_is_watched(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    RunLock(tmp_path).release()
    assert left(tmp_path) == []


@pytest.mark.usefixtures("quick")
def test_a_lock_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / LOCK_FILE)
    RunLock(tmp_path).release()
    assert left(tmp_path) == []


@pytest.mark.parametrize("changes", [{"process": 2**22 + 1, "born": "1"}, {"process": os.getpid(), "born": "1"}])
def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path, changes, capsys):
    written_by(tmp_path, **changes)
    RunLock(tmp_path).release()
    assert "taken over from process" in capsys.readouterr().err


@pytest.mark.parametrize("links", [True, False])
def test_of_many_at_once_one_wins(tmp_path, links, monkeypatch):
    if not links:

        def refuse(*names):
            raise PermissionError(1, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    written_by(tmp_path, process=2**22 + 1, born="1")
    start = threading.Barrier(8)

    def take(_):
        start.wait()
        try:
            return RunLock(tmp_path)
        except CheckpointError:
            return None

    with ThreadPoolExecutor(8) as pool:
        locks = [lock for lock in pool.map(take, range(8)) if lock is not None]
    assert len(locks) == 1
    assert locks[0].lost_to() is None
    locks[0].release()
    assert left(tmp_path) == []


def test_a_process_that_ended_while_it_took_over_is_taken_over_too(tmp_path):
    written_by(tmp_path, process=2**22 + 1, born="1")
    ends_midway = (
        "import os, pathlib, signal, sys; from magma_jax.training.checkpoints.run_lock import RunLock; "
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL); RunLock(pathlib.Path(sys.argv[1]))"
    )
    ended = subprocess.run([sys.executable, "-c", ends_midway, str(tmp_path)], stderr=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL
    lock = RunLock(tmp_path)
    assert lock.lost_to() is None
    with pytest.raises(CheckpointError):
        RunLock(tmp_path)
    lock.release()


@pytest.mark.usefixtures("quick")
def test_a_process_that_lost_the_folder_saves_nothing(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, writing=True)
    checkpoints.save(snapshot(1))
    written_by(tmp_path)  # as a process would that took this one for gone
    with pytest.raises(CheckpointError, match=r"taken over by process 7 on 'far'.*stops without saving"):
        checkpoints.save(snapshot(2))
    checkpoints.close()
    assert left(tmp_path) == [LOCK_FILE]  # that of the other
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.usefixtures("quick")
def test_a_lock_that_somebody_removed_comes_back(tmp_path):
    lock = RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    while not (tmp_path / LOCK_FILE).exists():
        pass  # until the next beat
    with pytest.raises(CheckpointError):
        RunLock(tmp_path)
    lock.release()
    assert left(tmp_path) == []

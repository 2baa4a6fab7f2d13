"""A run folder in a bucket: checkpoints, resuming, one writer, and what happens if the bucket is lost."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.commands import UNUSABLE
from magma_jax.config import ConfigError
from magma_jax.storage.model_folder import CheckpointError, read_model_json
from magma_jax.storage.objects.copies import WorkingCopy, local_copy
from magma_jax.storage.objects.store import Store, StoreError
from magma_jax.training.checkpoints import run_lock
from magma_jax.training.checkpoints.bucket_checkpoints import BucketCheckpoints
from magma_jax.training.checkpoints.bucket_lock import BucketLock, bucket_writer
from magma_jax.training.checkpoints.checkpoint import RunCheckpoints, Snapshot
from magma_jax.training.checkpoints.early_stopping import BestStep
from magma_jax.training.checkpoints.run_lock import LOCK_FILE, myself
from magma_jax.training.step.train_step import TrainState
from tests import tiny
from tests.storage.gcs_server import bucket_server
from tests.storage.s3_server import s3_server

pytest.importorskip("gcsfs")

RUN = "gs://bucket/runs/a"
STEPS = "runs/a/checkpoints"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = bucket_server()
    bucket.clear()
    return bucket


@pytest.fixture
def quick(monkeypatch):
    """Beats and patience of tests."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)
    monkeypatch.setattr(run_lock, "WATCH_S", 60.0)  # a sign of life ends the watch
    monkeypatch.setattr(run_lock, "POLL_S", 0.01)


def snapshot(step, best=None):
    trainable = {"lm/layers/attn/q_proj/weight": jnp.full((2, 4), step, jnp.bfloat16)}
    state = TrainState(jnp.int32(step), trainable, {"encoder/mean": jnp.full(3, 0.1 * step)}, {"m": jnp.zeros(2)})
    return Snapshot(state, jax.random.key(step), {"epoch": step}, BestStep(best))


def opened(tmp_path, name="copy", keep=2, address=RUN):
    return BucketCheckpoints(WorkingCopy(address, tmp_path / name), keep=keep)


def save(tmp_path, *steps, **options):
    with opened(tmp_path, **options) as checkpoints:
        for step in steps:
            checkpoints.save(snapshot(step))


def steps(bucket):
    """Steps in the bucket, and whether they are whole."""
    names = bucket.names(f"{STEPS}/")
    return {int(name.split("/")[3]): f"{STEPS}/{name.split('/')[3]}/SHA256SUMS" in names for name in names}


def restored(tmp_path, name="again", **options):
    with opened(tmp_path, name, **options) as checkpoints:
        zero = snapshot(0)
        return checkpoints.restore(zero.state, zero.key)


def same(a, b):
    """Bit for bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_steps_come_back_bit_for_bit_and_old_ones_go(bucket, tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpoints.restore(snapshot(0).state, snapshot(0).key)
        (tmp_path / "copy/a/metrics.jsonl").write_text("1\n")
        for step, best in ((1, 1), (2, 1), (3, 1), (4, 1)):
            checkpoints.save(snapshot(step, best))
    assert steps(bucket) == {1: True, 3: True, 4: True}
    assert bucket.objects["runs/a/metrics.jsonl"][0] == b"1\n"
    assert not bucket.names(f"runs/a/{LOCK_FILE}")
    # What makes a step whole is written after everything else of it.
    posted = [name for method, name in bucket.requests if method == "POST" and name.startswith(f"{STEPS}/4/")]
    assert posted.index(f"{STEPS}/4/SHA256SUMS") == len(posted) - 1
    found, wanted = restored(tmp_path), snapshot(4, 1)
    assert (found.data, found.best) == (wanted.data, wanted.best)
    same(found.state, wanted.state)
    same(jax.random.key_data(found.key), jax.random.key_data(wanted.key))
    # Readers take a copy, without what only training needs.
    run = local_copy(RUN)
    with RunCheckpoints(run) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert not list(run.glob("checkpoints/*/optimizer"))


def test_steps_in_s3(bucket, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    s3_server()
    run = RUN.replace("gs", "s3")
    save(tmp_path, 1, 2, 3, address=run)
    assert steps(bucket) == {2: True, 3: True}
    same(restored(tmp_path, address=run).state, snapshot(3).state)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match=f"{run}: several processes can save to gs:// or a shared disk only"):
        opened(tmp_path, address=run)


def test_unfinished_steps_go_and_damaged_ones_give_way(bucket, tmp_path, capsys):
    save(tmp_path, 1, 2, 3, keep=3)
    del bucket.objects[f"{STEPS}/3/SHA256SUMS"]
    name = next(name for name in bucket.names(f"{STEPS}/2/params/") if "/d/" in name)
    content, generation = bucket.objects[name]
    bucket.objects[name] = bytes([content[0] ^ 1]) + content[1:], generation + 1
    with opened(tmp_path, "again") as checkpoints:
        assert not bucket.names(f"{STEPS}/3/")
        found = checkpoints.restore(snapshot(0).state, snapshot(0).key)
        assert int(found.state.step) == 1
        said = capsys.readouterr().err
        assert f"{RUN}/checkpoints/2: damaged (params" in said
        assert f"has changed since it was written); using {RUN}/checkpoints/1" in said
        checkpoints.save(snapshot(2))  # over the damaged one
    assert int(restored(tmp_path, "third").state.step) == 2
    for step in (1, 2):
        bucket.objects[f"{STEPS}/{step}/SHA256SUMS"] = b"", 1
    with pytest.raises(CheckpointError, match=f"{RUN}/checkpoints/2: damaged .*every checkpoint is damaged; begin in"):
        restored(tmp_path, "fourth")


def stop(lock):
    """Ends the signs of life."""
    lock._ended.set()
    lock._thread.join()


def test_one_writer(bucket, tmp_path, quick, monkeypatch, capsys):
    lock = BucketLock(Store(RUN))
    mine = f"process {os.getpid()} on "
    with pytest.raises(CheckpointError, match=f"{RUN}: {mine}.* is writing this run; wait for it"):
        opened(tmp_path)
    assert mine in bucket_writer(Store(RUN))
    # Of a machine that cannot be seen from here, as long as it gives signs of life.
    elsewhere = json.dumps(myself() | {"token": "00", "host": "far", "process": 7, "machine": "far"})
    stop(lock)
    lock._token, lock._line = "00", f"{elsewhere}\n"
    bucket.put(f"runs/a/{LOCK_FILE}", lock._content())
    lock._ended.clear()
    lock._thread = threading.Thread(target=lock._keep_beating, daemon=True)
    lock._thread.start()
    with pytest.raises(CheckpointError, match=f"{RUN}: process 7 on 'far'"):
        opened(tmp_path)
    stop(lock)
    monkeypatch.setattr(run_lock, "WATCH_S", 0.3)
    with opened(tmp_path) as checkpoints:
        assert "taken over from process 7 on 'far'" in capsys.readouterr().err
        bucket.objects[f"runs/a/{LOCK_FILE}"] = f"{elsewhere}\n".encode(), 1
        with pytest.raises(CheckpointError, match=r"taken over by process 7 on 'far' .*; this process stops without"):
            checkpoints.save(snapshot(1))
    assert bucket.names() == [f"runs/a/{LOCK_FILE}"]


@pytest.mark.parametrize(
    ("status", "reason"), [(403, "The fault that was asked for"), (404, "The fault that was asked for")]
)
def test_a_bucket_lost_during_a_save_costs_no_older_step(bucket, tmp_path, status, reason):
    save(tmp_path, 1)
    with opened(tmp_path, "again") as checkpoints:
        bucket.fault = lambda method, name: status if method == "POST" and "/2/params/d/" in name else None
        checkpoints.save(snapshot(2))
        with pytest.raises(CheckpointError) as raised:
            checkpoints.close()
        bucket.fault = lambda method, name: None
    said = str(raised.value)
    assert said.startswith(f"{RUN}/checkpoints/2: could not be saved (")
    assert reason in said
    assert said.endswith("; step 1 is whole, and the run continues from it")
    assert "\n" not in said
    assert int(restored(tmp_path, "third").state.step) == 1
    assert steps(bucket) == {1: True}


def test_a_save_outlasts_a_passing_fault(bucket, tmp_path):
    failed = set()

    def once(method, name):
        first = method == "POST" and name.endswith(("manifest.ocdbt", "SHA256SUMS")) and name not in failed
        failed.add(name)
        return 503 if first else None

    bucket.fault = once
    save(tmp_path, 1)
    assert steps(bucket) == {1: True}


@pytest.fixture
def tiny_data(monkeypatch):
    monkeypatch.setattr("magma_jax.training.run.setup.load_dataset", lambda config: tiny.dataset())


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit(bucket, tmp_path, tiny_data):
    config = tiny.run_config()
    whole = tiny.train(config, tmp_path / "whole")
    first = tiny.train(dataclasses.replace(config, steps=2), RUN)
    assert first.copy.address == RUN
    lines = bucket.objects["runs/a/metrics.jsonl"][0].splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    run = tiny.train(config, RUN)
    same(run.state, whole.state)
    lines = bucket.objects["runs/a/metrics.jsonl"][0].splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert any("tensorboard/events" in name for name in bucket.names("runs/a/"))
    assert steps(bucket) == {3: True, 4: True}
    assert not run.workdir.is_relative_to(tmp_path)
    with pytest.raises(ConfigError, match=f"{RUN}: holds a run; choose another --workdir"):
        tiny.loop.train(tiny.family_of(config.model), config, RUN, resume=False)
    # As the base of another run, in another place of the bucket.
    other = tiny.train(dataclasses.replace(config, base=RUN, steps=0), "gs://bucket/runs/b")
    assert read_model_json(other.workdir)["base"]["path"] == RUN
    same(other.params, run.params)
    kept = [len(bucket.names(f"runs/{name}/params/")) for name in "ab"]
    assert kept[1] < kept[0]  # frozen parameters stay in the base


def test_a_bucket_that_is_not_there_begins_nothing(bucket, tmp_path):
    with pytest.raises(StoreError, match="gs://another/run: there is no bucket another"):
        tiny.train(tiny.run_config(), "gs://another/run")
    with pytest.raises(StoreError, match="gs://another/run: there is no bucket another"):
        tiny.train(tiny.run_config(base="gs://another/run"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_during_ten_saves_nothing_is_lost(bucket):
    """A run of thirty steps, each of them saved, is killed ten times after a random number of the bucket's writes."""
    expected, status = run_process(bucket, "gs://bucket/whole")
    assert status == 0
    chosen = random.Random(0)
    for number in range(10):
        writes, newest = chosen.randrange(1, 60), newest_whole(bucket)
        _, status = run_process(bucket, RUN, kill_after=writes)
        print(f"{number}: killed at write {writes}; newest whole step {newest}, then {newest_whole(bucket)}")
        assert status == -signal.SIGKILL
        assert newest_whole(bucket) >= newest
    assert run_process(bucket, RUN) == (expected, 0)


def newest_whole(bucket):
    return max((step for step, whole in steps(bucket).items() if whole), default=0)


@pytest.mark.slow
def test_a_run_that_lost_its_bucket_ends(bucket):
    """Not only its line appears: the process ends, although Orbax's threads still try to write."""
    lost = threading.Event()

    def fault(method, name):
        if method == "POST" and "/checkpoints/2/" in name:
            lost.set()
        return 503 if lost.is_set() else None

    bucket.fault = fault
    command = [sys.executable, "-m", "tests.training.bucket_run", "gs://bucket/runs/lost"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == UNUSABLE
    last = done.stderr.splitlines()[-1]
    assert last.startswith("bucket_run: gs://bucket/runs/lost/checkpoints/2: could not be saved (")
    assert last.endswith("; step 1 is whole, and the run continues from it")


def run_process(bucket, address, kill_after=None):
    """Output and exit status of ``bucket_run``, which is killed after so many writes below its checkpoints."""
    bucket.requests.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.bucket_run", address], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )

    def kill(method, name, left=itertools.count(1)):
        if method == "POST" and "/checkpoints/" in name and next(left) == kill_after:
            process.kill()

    bucket.fault = kill
    try:
        return process.communicate(timeout=600)[0], process.returncode
    finally:
        process.kill()

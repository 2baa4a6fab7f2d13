"""Checkpoints of a run: all of the state on any mesh, the newest and the best kept, damage noticed and survived."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magma_jax.models.magma import SHARDINGS
from magma_jax.runtime.sharding import MeshConfig, make_mesh, placed, replicated, tree_shardings
from magma_jax.storage.checksums import SUMS_FILE
from magma_jax.storage.model_folder import CheckpointError
from magma_jax.training.checkpoints import checkpoint
from magma_jax.training.checkpoints.checkpoint import CHECKPOINTS, RunCheckpoints, Snapshot
from magma_jax.training.checkpoints.early_stopping import BestStep
from magma_jax.training.step.train_step import TrainState, init_state

OPTIMIZER = optax.adam(1e-2)


def _snapshot(step, best=BestStep()):
    """A state that only this step has."""
    rows = jnp.arange(32.0).reshape(8, 4) + step
    trainable = {"lm/layers/attn/q_proj/weight": rows, "lm/layers/mlp_adapter/up/weight": rows.astype(jnp.bfloat16)}
    state = init_state(trainable, {"bn/mean": rows[0]}, OPTIMIZER)
    moments = jax.tree.map(lambda leaf: leaf + jnp.asarray(step / 7, leaf.dtype), state.opt_state)
    state = TrainState(jnp.int32(step), trainable, state.statistics, moments)
    return Snapshot(state, jax.random.key(step), {"next_index": step}, best)


def _save(workdir, *snapshots, **options):
    with RunCheckpoints(workdir, writing=True, **options) as checkpoints:
        for snapshot in snapshots:
            checkpoints.save(snapshot)


def _restore(workdir, *, writing=False):
    blank = _snapshot(0)
    with RunCheckpoints(workdir, writing=writing) as checkpoints:
        return checkpoints.restore(blank.state, blank.key)


def _assert_equal(got, wanted):
    assert jax.tree.structure(got.state) == jax.tree.structure(wanted.state)
    for a, b in zip(jax.tree.leaves(got.state), jax.tree.leaves(wanted.state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert jax.random.key_impl(got.key) == jax.random.key_impl(wanted.key)
    np.testing.assert_array_equal(jax.random.key_data(got.key), jax.random.key_data(wanted.key))
    assert (got.data, got.best) == (wanted.data, wanted.best)


def _steps(workdir):
    return sorted(path.name for path in (workdir / CHECKPOINTS).iterdir())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    _save(workdir, _snapshot(3), _snapshot(4))
    return workdir


@pytest.fixture
def workdir(two_steps, tmp_path):
    shutil.copytree(two_steps / CHECKPOINTS, tmp_path / CHECKPOINTS)
    return tmp_path


def test_everything_comes_back_on_any_mesh(tmp_path):
    saved = _snapshot(7, BestStep(5, 1.25, 2))

    def on_mesh(*sizes):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
        return placed(saved.state, tree_shardings(saved.state, mesh, SHARDINGS)), replicated(mesh)

    shapes, whole = on_mesh(8, 1, 1)
    state = jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), saved.state, shapes)
    _save(tmp_path, Snapshot(state, jax.device_put(saved.key, whole), saved.data, saved.best))
    for sizes in ((2, 2, 2), (1, 1, 1)):
        shapes, whole = on_mesh(*sizes)
        with RunCheckpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(shapes, jax.device_put(jax.random.key(0), whole))
        _assert_equal(restored, saved)
        for leaf, shape in zip(jax.tree.leaves(restored.state), jax.tree.leaves(shapes), strict=True):
            assert leaf.sharding == shape.sharding
        assert restored.key.sharding.is_equivalent_to(whole, 0)


def test_a_save_holds_its_step_though_the_next_steps_reuse_its_memory(tmp_path):
    # Random and large enough to be written while the steps run.
    trainable = {"lm/layers/attn/q_proj/weight": jax.random.normal(jax.random.key(0), (4, 1024, 1024))}
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = step(init_state(trainable, {}, OPTIMIZER))
    wanted = np.array(state.trainable["lm/layers/attn/q_proj/weight"])
    with RunCheckpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(Snapshot(state, jax.random.key(0), {}))
        for _ in range(4):
            state = step(state)
    with RunCheckpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(state, jax.random.key(0)).state
    np.testing.assert_array_equal(restored.trainable["lm/layers/attn/q_proj/weight"], wanted)


def test_the_newest_and_the_best_are_kept(tmp_path):
    best = BestStep()
    snapshots = []
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.25], 1):
        best = best.after(step, loss)
        snapshots.append(_snapshot(step, best))
    _save(tmp_path, *snapshots[:4], keep=2)
    assert _steps(tmp_path) == ["2", "3", "4"]
    # A resumed run knows the best step from its checkpoint.
    with RunCheckpoints(tmp_path, writing=True, keep=2) as checkpoints:
        checkpoints.restore(_snapshot(0).state, jax.random.key(0))
        checkpoints.save(snapshots[4])
    assert _steps(tmp_path) == ["2", "4", "5"]
    blank = _snapshot(0).state
    with RunCheckpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.result_step()) == (5, 2)
        params = checkpoints.restore_params(blank.trainable, blank.statistics)
    np.testing.assert_array_equal(params["bn/mean"], snapshots[1].state.statistics["bn/mean"])


def test_without_validation_the_newest_stands_for_the_run(workdir):
    with RunCheckpoints(workdir) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.result_step()) == (4, 4)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def remove(path):
    path.unlink()


def _largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, remove])
def test_a_damaged_step_is_moved_aside_and_the_one_before_is_used(workdir, capsys, damage):
    folder = workdir / CHECKPOINTS / "4"
    damage(_largest(folder / "params"))
    _assert_equal(_restore(workdir, writing=True), _snapshot(3))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}: damaged (params/")
    assert line.endswith(f"moved to {folder}.damaged; using {workdir / CHECKPOINTS / '3'}")
    assert _steps(workdir) == ["3", "4.damaged"]
    # The run goes on, meets the same fate again, and still nothing is lost.
    _save(workdir, _snapshot(4))
    _assert_equal(_restore(workdir), _snapshot(4))
    damage(_largest(folder / "optimizer"))
    _assert_equal(_restore(workdir, writing=True), _snapshot(3))
    assert _steps(workdir) == ["3", "4.damaged", "4.damaged-2"]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, remove])
def test_no_file_of_a_step_can_be_damaged_unnoticed(two_steps, tmp_path, damage):
    folder = two_steps / CHECKPOINTS / "4"
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    for i, file in enumerate(files):
        shutil.copytree(two_steps / CHECKPOINTS, tmp_path / str(i) / CHECKPOINTS)
        damage(tmp_path / str(i) / CHECKPOINTS / "4" / file)
        # Two files do not matter to the content: they say that, when and by which classes the step was written.
        expected = 3 if file.name not in checkpoint.WRITTEN_LAST or len(file.parts) > 1 else None
        restored = _restore(tmp_path / str(i))
        step = int(restored.state.step)
        assert step == expected if expected else step in (3, 4), file
        _assert_equal(restored, _snapshot(step))


def test_a_step_that_was_never_finished_is_not_used(workdir, capsys):
    folder = workdir / CHECKPOINTS / "4"
    (folder / SUMS_FILE).unlink()
    _assert_equal(_restore(workdir), _snapshot(3))
    assert f"{folder}: damaged (no {SUMS_FILE}); using" in capsys.readouterr().err
    # As a killed save leaves it.
    folder.rename(folder.with_name("4.orbax-checkpoint-tmp"))
    _assert_equal(_restore(workdir), _snapshot(3))
    assert _steps(workdir) == ["3", "4.orbax-checkpoint-tmp"]  # a reader leaves alone what may be being written
    _save(workdir, _snapshot(5))
    assert _steps(workdir) == ["3", "5"]


def test_readers_go_back_too_but_move_nothing(workdir, capsys):
    flip_a_bit(_largest(workdir / CHECKPOINTS / "4" / "params"))
    blank = _snapshot(0).state
    with RunCheckpoints(workdir) as checkpoints:
        params = checkpoints.restore_params(blank.trainable, blank.statistics)
        assert checkpoints.result_step() == 3
    np.testing.assert_array_equal(params["bn/mean"], _snapshot(3).state.statistics["bn/mean"])
    assert "damaged (params/" in capsys.readouterr().err
    assert _steps(workdir) == ["3", "4"]


def test_a_damaged_best_step_gives_way_to_the_newest(tmp_path, capsys):
    best = BestStep(2, 1.0)
    _save(tmp_path, _snapshot(2, best), _snapshot(3, best), _snapshot(4, best), keep=1)
    truncate(_largest(tmp_path / CHECKPOINTS / "2" / "params"))
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.result_step() == 4
    assert f"{tmp_path / CHECKPOINTS / '2'}: damaged" in capsys.readouterr().err


def test_if_every_step_is_damaged_one_line_says_so_and_nothing_is_touched(workdir):
    for step in ("3", "4"):
        flip_a_bit(_largest(workdir / CHECKPOINTS / step))
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(4: .*; 3: .*\)") as caught:
        _restore(workdir, writing=True)
    assert "\n" not in str(caught.value)
    assert _steps(workdir) == ["3", "4"]


def test_a_folder_without_steps(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpoints.result_step()


def test_a_failed_save_is_raised_and_costs_no_older_step(workdir, monkeypatch, capfd):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def run_on(checkpoints):
        while True:
            checkpoints.check()

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    checkpoints = RunCheckpoints(workdir, writing=True, keep=1)
    for outlive in (
        run_on,
        lambda checkpoints: checkpoints.save(_snapshot(6)),
        lambda checkpoints: checkpoints.close(),
    ):
        checkpoints.save(_snapshot(5))
        with pytest.raises(CheckpointError, match=r"/5: the disk is full \(No space left"):
            outlive(checkpoints)
    assert "Traceback" not in capfd.readouterr().err
    _assert_equal(_restore(workdir), _snapshot(4))
    monkeypatch.undo()
    _save(workdir, _snapshot(6), keep=3)
    assert _steps(workdir) == ["3", "4", "6"]


def test_what_the_run_says_itself_orbax_does_not_log(tmp_path, caplog):
    with RunCheckpoints(tmp_path, writing=True):
        logger = logging.getLogger("absl")
        for said in ("Reached preemption sync point, step=26", "something else"):
            logger.handle(logger.makeRecord("absl", logging.WARNING, "orbax/multihost.py", 437, said, (), None))
    assert [record.message for record in caplog.records] == ["something else"]

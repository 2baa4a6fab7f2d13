"""The same run on any mesh and any number of processes: losses agree, frozen parameters keep their bits."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from magma_jax.config import ConfigError
from magma_jax.families import family_of
from magma_jax.families.magma.image_features import image_loader
from magma_jax.runtime.sharding import MeshConfig, make_mesh, place_batch
from magma_jax.storage.model_folder import read_params
from magma_jax.training.monitor.writers import METRICS_FILE
from magma_jax.training.run.program import build_program, fresh_params
from magma_jax.training.step.optim import partition
from magma_jax.typing import Params
from tests import tiny
from tests.storage.gcs_server import bucket_server

# Of one fp32 step; another mesh sums in another order.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
PROCESS_MESH = (2, 2, 2)
ROOT = Path(__file__).parents[2]


def _first_step(sizes: MeshConfig, seeds: Sequence[int] = (0,)) -> tuple[list[Any], Params]:
    """Metrics of the first step, by seeds of its dropout, and the frozen parameters behind it."""
    config = tiny.mesh_config(sizes, steps=1)
    mesh = make_mesh(config.mesh, jax.devices()[: sizes.data * sizes.fsdp * sizes.model * sizes.slice])
    program = build_program(family_of(config.model), config, mesh)
    params = fresh_params(family_of(config.model), config, program.params)
    dataset, size = tiny.dataset(), config.batch_size
    batch = next(iter(dataset.batches(size, config.seed, range(size))))
    batch = place_batch(image_loader(dataset.images, program, params)(batch), mesh, size)
    frozen = partition(params, program.labels)[1]
    metrics = [program.step(program.init_state(params), frozen, batch, jax.random.key(seed))[1] for seed in seeds]
    return jax.device_get(metrics), {path: np.asarray(leaf) for path, leaf in frozen.items()}


@pytest.fixture(scope="module")
def one_device() -> tuple[dict[str, float], Params]:
    (metrics, other), frozen = _first_step(MeshConfig(1, 1, 1), seeds=(0, 1))
    # Dropout matters: gradients agree only where it falls on the same places.
    assert abs(metrics["grad_norm"] - other["grad_norm"]) > 10 * GRADIENT_TOLERANCE * metrics["grad_norm"]
    return metrics, frozen


# Two slices of (1, 2, 2); one slice of (2, 2, 2) is what the other tests of meshes have.
SIZES = [(1, 2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(8, 1, 1), (1, 8, 1)])]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_step_is_the_same_on_every_mesh(one_device, sizes):
    expected, expected_frozen = one_device
    (metrics,), frozen = _first_step(MeshConfig(*sizes))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=LOSS_TOLERANCE)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=GRADIENT_TOLERANCE)
    assert frozen.keys() == expected_frozen.keys()
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, expected_frozen[path], err_msg=path)


def test_a_batch_that_cannot_be_split_evenly_is_an_error():
    config = dataclasses.replace(tiny.mesh_config(MeshConfig(fsdp=8), steps=1), accumulate=2)
    with pytest.raises(ConfigError, match=r"8 is not a multiple of 16 \(mesh\.slice x mesh\.data x mesh\.fsdp = 8"):
        build_program(family_of(config.model), config, make_mesh(config.mesh))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[Path, list[tuple[int, str, str]]]:
    """Folder and results of four steps on two processes that nothing happens to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, _run_processes(workdir, *PROCESS_MESH, steps=4)


@pytest.mark.slow
def test_two_processes_do_the_same_step(one_device, whole_run):
    (expected, frozen), (workdir, results) = one_device, whole_run
    assert [status for status, _, _ in results] == [0, 0], results
    first = _metrics(workdir)[0]
    np.testing.assert_allclose(first["loss"], expected["loss"], rtol=LOSS_TOLERANCE)
    np.testing.assert_allclose(first["grad_norm"], expected["grad_norm"], rtol=GRADIENT_TOLERANCE)
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in frozen.items()}
    for path, leaf in read_params(workdir, shapes).items():
        np.testing.assert_array_equal(leaf, frozen[path], err_msg=path)


@pytest.mark.slow
def test_a_killed_process_stops_the_other_and_a_restart_goes_on_exactly(whole_run, tmp_path):
    (survivor, _, errors), (killed, _, _) = _run_processes(
        tmp_path / "run", *PROCESS_MESH, steps=4, second={"DIES_AFTER": "2"}
    )
    assert killed == -signal.SIGKILL
    assert survivor != 0
    assert "process 0 of 2" in errors
    assert "start all processes again" in errors
    resumed = _run_processes(tmp_path / "run", *PROCESS_MESH, steps=4)
    assert "resuming after step" in resumed[0][2]
    workdir, results = whole_run
    # Exit status, and the hash of what each process holds of the trained state (Gloo prints before it).
    ends = [[(status, output.split()[-1]) for status, output, _ in part] for part in (resumed, results)]
    assert ends[0] == ends[1]
    assert [status for status, _ in ends[0]] == [0, 0]
    assert [line["loss"] for line in _metrics(tmp_path / "run")] == [line["loss"] for line in _metrics(workdir)]


@pytest.mark.slow
def test_two_processes_train_in_a_bucket(whole_run):
    pytest.importorskip("gcsfs")
    bucket_server().clear()
    for steps in (2, 4):
        results = _run_processes("gs://bucket/run", *PROCESS_MESH, steps=steps)
    ends = [[(status, output.split()[-1]) for status, output, _ in part] for part in (results, whole_run[1])]
    assert ends[0] == ends[1]
    assert "resuming after step 2" in results[0][2]
    lines = bucket_server().objects["run/metrics.jsonl"][0].splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [line["loss"] for line in _metrics(whole_run[0])]


def _run_processes(
    workdir: Path | str, *mesh: int, steps: int, second: dict[str, str] | None = None
) -> list[tuple[int, str, str]]:
    """Runs two processes of four devices; returns exit status, stdout and stderr of each.

    A process has a minute to end once the other one has.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("process.py")), str(workdir), *map(str, (*mesh, steps))]
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    environments = [shared | {"JAX_PROCESS_ID": "0"}, shared | {"JAX_PROCESS_ID": "1"} | (second or {})]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for environment in environments]
    try:
        results = {}
        # The one that is killed first: the other's minute begins then.
        for i in (1, 0) if second else (0, 1):
            output, errors = processes[i].communicate(timeout=60 if results else 300)
            results[i] = (processes[i].returncode, output, errors)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [results[0], results[1]]


def _metrics(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]

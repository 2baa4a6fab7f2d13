"""Signals: the first one is noted, the second one acts as it does elsewhere."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from magma_jax.families import family_of, run_config
from magma_jax.runtime.sharding import make_mesh
from magma_jax.storage.model_folder import read_model_json
from magma_jax.training.checkpoints.checkpoint import RunCheckpoints
from magma_jax.training.faults.interruption import StopRequest
from magma_jax.training.run.program import build_program
from tests import tiny


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def number(request):
    return request.param


def test_the_first_signal_is_noted_and_told(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.reached(1)
        signal.raise_signal(number)
        assert stop.reached(2)
        assert stop.signal == number.name
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == f"\n{number.name}: finishing this step, then saving; once more stops at once\n"


@pytest.fixture
def interrupts():
    """Python's own answer to Ctrl-C; behind a shell's & it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_the_second_ctrl_c_stops_at_once():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_second_sigterm_is_no_longer_held_back():
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_get_no_signals():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.reached(1)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_one_process_reads_it(tmp_path):
    run, script = tmp_path / "run", Path(__file__).with_name("process.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, str(script), str(run), "2", "4", "1", "100000"]
    processes = [
        subprocess.Popen(command, env={**shared, "JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        while not any((run / "checkpoints").glob("[0-9]")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.2)
        processes[1].send_signal(signal.SIGTERM)
        first, second = (process.communicate(timeout=300)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], first + second
    (step,) = re.findall(r"SIGTERM: stopped after step (\d+) of 100000, which is saved", first)
    assert "stopped after" not in second  # the first process speaks for both

    config = run_config(read_model_json(run)["run"])
    program = build_program(family_of(config.model), config, make_mesh(tiny.run_config().mesh, jax.devices()[:1]))
    with RunCheckpoints(run) as checkpoints:
        snapshot = checkpoints.restore(program.state, jax.random.key(0))
    assert int(snapshot.state.step) == int(step)
    assert snapshot.data == {"next_index": int(step)}  # batches, whoever read them
    assert snapshot.state.trainable["image_prefix/proj/weight"].devices() == {jax.devices()[0]}

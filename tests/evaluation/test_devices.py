"""The command line of tasks: files and card, the same from one device, from many, and from two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from magma_jax.config import to_dict
from magma_jax.storage.model_folder import write_model_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_folder(talkative, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "talkative"
    metadata = {"model": to_dict(talkative.config)}
    write_model_folder(
        path, metadata, talkative.params, lambda partial: talkative.tokenizer.save(partial / "tokenizer")
    )
    return path


def start(model_folder, folders, output, *options, **environment):
    command = [sys.executable, ROOT / "eval.py", "--checkpoint", model_folder, "--task", "vqav2", "--shots", "0", "1"]
    command += ["--data", folders / "val", "--shot-data", folders / "train", "--output", output]
    command += ["--set", "max_new_tokens=4", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        list(map(str, command)), env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, **pipes
    )


def ended(processes):
    try:
        return [(*process.communicate(timeout=300), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def files(folder):
    # Beside these there are pages and submissions, made of the same.
    return {
        path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jsonl", ".txt")
    }


@pytest.mark.slow
def test_one_device_many_and_two_processes_write_the_same(model_folder, folders, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    one = start(model_folder, folders, tmp_path / "one")
    ((printed, errors, status),) = ended([one])
    assert status == 0, errors
    assert "this model" in printed
    assert "MAGMA long" in printed
    expected = files(tmp_path / "one")
    names = {name.rsplit("-", 1)[0] for name in expected}
    assert {"vqav2-0shot-max_new_tokens=4", "card-max_new_tokens=4"} <= names

    mesh = ("--mesh", "data=2", "model=2")
    several = [
        start(model_folder, folders, tmp_path / "two", *mesh, "--distributed", JAX_PROCESS_ID=number, **shared)
        for number in ("0", "1")
    ]
    results = ended(several)
    assert [status for *_, status in results] == [0, 0], results
    assert "this model" not in results[1][0]
    assert files(tmp_path / "two") == expected
    ((_, errors, status),) = ended([start(model_folder, folders, tmp_path / "many", "--mesh", "data=2", "fsdp=4")])
    assert status == 0, errors
    assert files(tmp_path / "many") == expected


@pytest.mark.slow
def test_mistakes_are_said_in_one_line(model_folder, folders, tmp_path):
    results = ended(
        [
            start(model_folder, tmp_path, tmp_path / "a"),
            start(model_folder, folders, tmp_path / "b", "truncation=letters"),
        ]
    )
    expected = ["val: no dataset folder", "vqav2.truncation: 'letters' is not one of"]
    for (_, errors, status), message in zip(results, expected, strict=True):
        assert status == 2
        assert errors.startswith("eval.py: ")
        assert message in errors
        assert errors.count("\n") == 1

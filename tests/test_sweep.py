"""Runs over combinations of config values, in processes of their own and as a job array."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from magma_jax.__main__ import main
from magma_jax.cli import sweep_runs
from magma_jax.commands import FOUND, STOPPED, UNUSABLE
from tests.storage.gcs_server import bucket_server

OVER = ["--over", "optim.learning_rate", "1e-3", "3e-4", "--over", "seed", "0", "1"]

# In place of train: seed 1 fails the first time, a loss depends on the learning rate, and SIGTERM is obeyed.
TRAIN = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
folder.mkdir(exist_ok=True)
settings = dict(word.split("=", 1) for word in sys.argv[sys.argv.index("--set") + 1 :])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(folder / "started").touch()
while settings.get("steps") == "99" and not (folder / "go").exists():
    time.sleep(0.02)
if settings["seed"] == "1" and not (folder / "again").exists():
    (folder / "again").touch()
    sys.exit(2)
lines = [{"step": 3, "loss": float(settings["optim.learning_rate"])}, {"step": 4, "validation_loss": 2.5}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
(folder / "results.json").write_text(json.dumps({"cider": 1.25, "protocol": {}}))
print(*settings)
"""


IN_BUCKET = """
import json, sys
from magma_jax.storage.objects.store import Store
run = Store(sys.argv[sys.argv.index("--workdir") + 1])
settings = dict(word.split("=", 1) for word in sys.argv[sys.argv.index("--set") + 1 :])
print("again" if run.entries() else "first")
if settings["seed"] == "1" and not run.entries():
    run.write("started", b"")
    sys.exit(2)
lines = [{"step": 3, "loss": float(settings["optim.learning_rate"])}, {"step": 4, "validation_loss": 2.5}]
run.write("metrics.jsonl", "".join(json.dumps(line) + chr(10) for line in lines).encode())
run.write("results.json", json.dumps({"cider": 1.25, "protocol": {}}).encode())
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The command on a quick start whose training is ``TRAIN``."""
    monkeypatch.chdir(tmp_path)
    start = subprocess.Popen

    def popen(command, **options):
        is_training = command[:4] == [sys.executable, "-m", "magma_jax", "train"]
        return start([sys.executable, "-c", TRAIN, *command[4:]] if is_training else command, **options)

    monkeypatch.setattr(sweep_runs.subprocess, "Popen", popen)
    monkeypatch.setattr(sweep_runs, "_POLL", 0.01)
    return lambda *words: main(["sweep", "--workdir", "sweep", *OVER, *words])


def test_every_combination_is_trained_and_stands_in_one_table(sweep, capsys):
    assert sweep("--jobs", "4", "--set", "steps=100") == FOUND
    table = capsys.readouterr().out.splitlines()[-5:]
    assert " ".join(table[0].split()) == "optim.learning_rate seed run ended step loss best validation_loss cider"
    assert table[1].split() == ["1e-3", "0", "finished", "4", "0.001", "2.5", "1.25"]
    assert table[2].split() == ["1e-3", "1", "failed", "with", "status", "2", "0", "-", "-", "-"]
    assert Path("sweep/learning_rate=3e-4-seed=0.log").read_text() == "steps optim.learning_rate seed\n"
    # Again: only those that failed.
    assert sweep("--set", "steps=100") == 0
    assert capsys.readouterr().out.count(": started") == 2
    assert len(json.loads(Path("sweep/sweep.json").read_text())) == 4
    assert Path("sweep/sweep.txt").read_text().count("finished") == 4
    # Other settings are another sweep.
    assert sweep("--table") == 0
    assert capsys.readouterr().out.count("not ended") == 4


def test_a_signal_stops_all_and_the_same_command_continues(sweep, capsys):
    def stop():
        while not all(Path(f"sweep/learning_rate=1e-3-seed={seed}/started").exists() for seed in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert sweep("--jobs", "2", "--set", "steps=99") == STOPPED
    thread.join()
    said = capsys.readouterr().out
    assert said.count(": stopped, to be continued") == 2
    assert said.count("not ended") == 2
    assert not Path("sweep/learning_rate=3e-4-seed=0").exists()


def test_an_error_stops_all_runs(sweep, monkeypatch, capsys):
    started = []
    start = sweep_runs.subprocess.Popen

    def popen(*words, **options):
        started.append(start(*words, **options))
        return started[-1]

    monkeypatch.setattr(sweep_runs.subprocess, "Popen", popen)
    run = Path("sweep/learning_rate=1e-3-seed=0")

    def spoil():
        while not all(Path(f"sweep/learning_rate=1e-3-seed={seed}/started").exists() for seed in (0, 1)):
            time.sleep(0.01)
        run.with_name(f"{run.name}.ended").mkdir()  # so that its end cannot be noted
        (run / "go").touch()

    thread = threading.Thread(target=spoil)
    thread.start()
    assert sweep("--jobs", "2", "--set", "steps=99") == UNUSABLE
    thread.join()
    assert f"{run.name}.ended" in capsys.readouterr().err
    assert [process.returncode for process in started] == [0, STOPPED]


def test_a_sweep_in_a_bucket(sweep, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gcsfs")
    bucket = bucket_server()
    bucket.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    # What it would write to a disk goes to the bucket.
    monkeypatch.setattr("tests.test_sweep.TRAIN", IN_BUCKET)
    command = ["--workdir", "gs://bucket/sweep", "--jobs", "2", "--set", "steps=100"]
    assert sweep(*command) == FOUND
    assert capsys.readouterr().out.splitlines()[-4].split() == ["1e-3", "0", "finished", "4", "0.001", "2.5", "1.25"]
    assert sweep(*command) == 0
    assert capsys.readouterr().out.count(": started") == 2
    assert bucket.objects["sweep/learning_rate=3e-4-seed=1.log"][0].decode().split() == ["first", "again"]
    assert {name.rpartition("/")[2] for name in bucket.objects if name.count("/") == 1} >= {"sweep.txt", "sweep.json"}
    assert bucket.objects["sweep/sweep.txt"][0].count(b"finished") == 4
    assert sweep(*command, "--slurm", "sweep.sh") == 0
    assert "#SBATCH --output=slurm-%A-%a.log\n" in Path("sweep.sh").read_text()
    assert not Path("gs:").exists()
    capsys.readouterr()
    assert sweep("--workdir", "gs://another/sweep") == UNUSABLE
    assert capsys.readouterr().err.endswith("there is no bucket another; check the name, or create it\n")


def test_a_job_array_trains_one_each_and_requeues_what_was_stopped(sweep, tmp_path, capsys):
    assert sweep("--slurm", "sweep.sh", "--set", "steps=99") == 0
    assert "array of 4 tasks" in capsys.readouterr().out
    script = Path("sweep.sh").read_text()
    assert "#SBATCH --array=0-3\n" in script
    for name, does in {"srun": 'echo "$@" > srun.txt; exit $STATUS', "scontrol": 'echo "$@" > scontrol.txt'}.items():
        Path(name).write_text(f"#!/bin/sh\n{does}\n")
        Path(name).chmod(0o755)
    for status in (0, 143):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
        done = subprocess.run(["bash", "sweep.sh"], env=environment | {"STATUS": str(status)}, check=False)
        assert done.returncode == status
        assert Path("scontrol.txt").exists() == (status == 143)
    assert Path("scontrol.txt").read_text() == "requeue 5_2\n"
    words = Path("srun.txt").read_text().split()
    assert words[words.index("magma_jax") + 1] == "sweep"
    assert words[-2:] == ["--only", "2"]
    assert sweep("--only", "2", "--set", "steps=100") == 0
    assert [path.name for path in Path("sweep").iterdir() if path.is_dir()] == ["learning_rate=3e-4-seed=0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--over", "seed", "1"], "a setting is there twice"),
        (["--over", "steps"], "--over steps: give its values too"),
        (["--over", "optim.rate", "1"], "unknown key config.optim.rate"),
        (["--over", "batch_size", "8", "x"], "batch_size: expected int"),
        (["--over", "data.cache_dir", "a b", "a/b"], "two combinations would have the folder"),
        (["--only", "4"], "--only must be 0 to 3, got 4"),
        (["--config", "no.py"], "no.py: no such config file"),
    ],
)
def test_unusable_sweeps_are_refused_before_anything_is_trained(sweep, words, said, capsys):
    assert sweep(*words) == UNUSABLE
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("magma-jax sweep: ")
    assert error.count("\n") == 1
    assert not Path("sweep").exists()

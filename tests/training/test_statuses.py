"""Two real processes of ``magma-jax train``: the statuses with which they end, and what Kubernetes makes of them."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from magma_jax.commands import FOUND, STOPPED, UNUSABLE
from magma_jax.config import to_dict
from magma_jax.data.folder_dataset import FoldersConfig
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.runtime.distributed import COORDINATOR_GRACE_S, HEARTBEAT_TIMEOUT_S, RESTART
from magma_jax.training.step.optim import OptimConfig
from tests import datafolders, tiny
from tests.jobset import container_status, job_after, job_set, job_set_after

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# The heartbeats of the coordination service, and the time for a busy machine to start what ends the process.
NOTICED_S = HEARTBEAT_TIMEOUT_S + COORDINATOR_GRACE_S + 30
MODEL = dataclasses.replace(tiny.MODEL, lm=dataclasses.replace(tiny.MODEL.lm, layers=1), attn_adapter=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``run.py``, whose data have paths relative to the folder."""
    root = tmp_path_factory.mktemp("statuses")
    train_bpe(["image number the"], 299).save(root / "tokenizer")
    datafolders.folder(root / "captions", datafolders.captions())
    config = tiny.run_config(
        model=MODEL,
        optim=OptimConfig(learning_rate=1e-2, schedule="constant", groups={"encoder": "frozen"}),
        data=FoldersConfig(folders={"train": ("captions",)}, tokenizer="tokenizer", length=40, workers=0),
        steps=100_000,
        checkpoint_every=20,
        log_every=1000,
    )
    (root / "run.json").write_text(json.dumps(to_dict(config)))
    (root / "run.py").write_text(
        "import json\nfrom pathlib import Path\n\nfrom ml_collections import ConfigDict\n\n\n"
        "def get_config():\n    return ConfigDict(json.loads((Path(__file__).parent / 'run.json').read_text()))\n"
    )
    return root


class Pair:
    """Two processes of one run; ``places`` are their working folders."""

    def __init__(self, folder: Path, *settings: str, places: tuple[Path, Path] | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
        }
        words = ["--config", f"{folder}/run.py", "--workdir", f"{folder}/run", "--distributed", "--set", *settings]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "magma_jax", "train", *words],
                cwd=place,
                env=shared | {"JAX_PROCESS_ID": str(number)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, place in enumerate(places or (folder, folder))
        ]

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def ended(self, timeout: float = 300) -> tuple[list[int], list[str]]:
        """The statuses as Kubernetes reads them, and what each process printed."""
        printed = [process.communicate(timeout=timeout)[1] for process in self.processes]
        return [container_status(process.returncode) for process in self.processes], printed


def _newest(folder: Path) -> int:
    return max((int(path.name) for path in (folder / "run/checkpoints").glob("*") if path.name.isdigit()), default=0)


def _wait_for_a_checkpoint(pair: Pair, folder: Path) -> None:
    before = _newest(folder)
    while _newest(folder) == before:
        assert all(process.poll() is None for process in pair.processes), pair.ended()
        time.sleep(0.2)


def _kubernetes(statuses: list[int]) -> tuple[str, str]:
    """What becomes of the Job, and of the JobSet."""
    spec = job_set()
    (replicated,) = spec["replicatedJobs"]
    job = job_after(replicated["template"]["spec"], statuses)
    return job, job_set_after(spec, [job])


def test_a_run_survives_eviction_and_the_loss_of_a_machine(folder):
    with Pair(folder, "mesh.data=2") as pair:
        _wait_for_a_checkpoint(pair, folder)
        pair.processes[1].send_signal(signal.SIGTERM)
        statuses, printed = pair.ended()
    assert statuses == [STOPPED, STOPPED], printed
    assert "SIGTERM: stopped after step" in printed[0]
    assert "WARNING:absl" not in "".join(printed)
    assert _kubernetes(statuses) == ("pods start again", "goes on")

    with Pair(folder, "mesh.data=2") as pair:
        _wait_for_a_checkpoint(pair, folder)
        pair.processes[1].kill()
        pair.processes[1].wait()
        killed = time.monotonic()
        pair.processes[0].wait(NOTICED_S)
        print(f"the other ended after {time.monotonic() - killed:.1f} s")
        statuses, printed = pair.ended()
    assert statuses[1] == 137
    assert statuses[0] in (FOUND, 134), printed
    assert RESTART in printed[0]
    assert _kubernetes(statuses) == ("BackoffLimitExceeded", "RestartJobSet")

    with Pair(folder, "mesh.data=2", f"steps={_newest(folder) + 1}") as pair:
        statuses, printed = pair.ended()
    assert statuses == [0, 0], printed
    assert "resuming after step" in printed[0]
    assert _kubernetes(statuses) == ("complete", "complete")


@pytest.mark.parametrize(
    ("setting", "status", "line", "kubernetes"),
    [
        ('data.folders.train=("missing",)', UNUSABLE, "missing", ("PodFailurePolicy", "FailJobSet")),
        ("optim.learning_rate=1e38", FOUND, "not finite", ("BackoffLimitExceeded", "RestartJobSet")),
    ],
)
def test_a_failed_run_ends_with_the_status_of_a_single_process(folder, tmp_path, setting, status, line, kubernetes):
    for name in ("run.py", "run.json", "tokenizer", "captions"):
        (tmp_path / name).symlink_to(folder / name)
    with Pair(tmp_path, "mesh.data=2", setting) as pair:
        statuses, printed = pair.ended()
    assert statuses == [status, status], printed
    for number, text in enumerate(printed):
        (said,) = (one for one in text.splitlines() if one.startswith(f"process {number} of 2: "))
        assert line in said
    assert _kubernetes(statuses) == kubernetes


def test_data_that_one_machine_lacks_end_the_job_for_good(folder, tmp_path):
    for name in ("run.py", "run.json", "tokenizer", "captions"):
        (tmp_path / name).symlink_to(folder / name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with Pair(tmp_path, "mesh.data=2", places=(tmp_path, elsewhere)) as pair:
        statuses, printed = pair.ended()
    assert statuses[1] == UNUSABLE, printed
    assert statuses[0] in (FOUND, 134), printed
    assert "process 1 of 2: " in printed[1]
    assert _kubernetes(statuses) == ("PodFailurePolicy", "FailJobSet")

"""The runs of a sweep: their names, processes, and the table of their results.

A sweep's folder, on a disk or in object storage, has for every combination the run folder NAME, what it printed in
NAME.log, and how it ended in NAME.ended.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from magma_jax.commands import FOUND, STOPPED
from magma_jax.config import ConfigError, apply_overrides, load_config_file
from magma_jax.evaluation.tables import text_table
from magma_jax.families import run_config
from magma_jax.output import object_address, printable, replace_file
from magma_jax.storage.objects.copies import local_copy
from magma_jax.storage.objects.store import Store, StoreError
from magma_jax.training.monitor.writers import read_lines

# Seconds between looks at the running processes.
_POLL = 0.2


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One combination.

    Attributes:
        folder: its run folder: a path, or an address in object storage.
        values: value by swept setting, as text.
        settings: all overrides, as for ``train.py --set``.
        config: the config file.
    """

    folder: str
    values: dict[str, str]
    settings: tuple[str, ...]
    config: str

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.rpartition("/")[2]

    @property
    def log(self) -> str:
        """What the run prints; in object storage from the time when it has ended."""
        return f"{self.folder}.log"

    @property
    def _ended(self) -> str:
        return f"{self.folder}.ended"

    def end(self, status: int) -> None:
        """Notes how the run ended."""
        _write(self._ended, json.dumps({"status": status, "settings": self.settings}).encode())

    def status(self) -> int | None:
        """Exit status of these settings; None if they have not ended yet."""
        try:
            ended = json.loads(local_copy(self._ended).read_text())
            return int(ended["status"]) if tuple(ended["settings"]) == self.settings else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def planned(
    config: str | Path, workdir: str | Path, over: Sequence[Sequence[str]], shared: Sequence[str]
) -> list[SweepRun]:
    """All combinations, the last setting varying fastest.

    Args:
        config: config file or name.
        workdir: folder of the sweep: a path, or an address in object storage.
        over: a setting and its values, each.
        shared: overrides of all runs.

    Raises:
        ConfigError: a setting without values, given twice, or unusable in one of the runs.
    """
    choices = {key: values for key, *values in over}
    if len(choices) < len(over):
        raise ConfigError("--over: a setting is there twice; give all of its values at once")
    for key, values in choices.items():
        if not values:
            raise ConfigError(f"--over {key}: give its values too, as in --over seed 0 1")
    runs: dict[str, SweepRun] = {}
    for texts in itertools.product(*choices.values()):
        values = dict(zip(choices, texts, strict=True))
        settings = (*shared, *(f"{key}={text}" for key, text in values.items()))
        run_config(apply_overrides(load_config_file(config), list(settings)))  # refuses it before anything is trained
        plain = {key.rpartition(".")[2]: re.sub("[^A-Za-z0-9.,_+-]+", "_", text) for key, text in values.items()}
        name = "-".join(f"{key}={text}" for key, text in plain.items())
        if name in runs:
            raise ConfigError(f"--over: two combinations would have the folder {name}; leave one out")
        runs[name] = SweepRun(f"{workdir}/{name}", values, settings, str(config))
    return list(runs.values())


def train_all(runs: Sequence[SweepRun], jobs: int) -> int:
    """Trains what has not finished, ``jobs`` at a time, each as a process of its own.

    A signal is passed on once: the runs save and end, and no other starts. They do so too where an error ends this.

    Returns:
        0 if all have finished, 143 if a signal stopped them, else 1.
    """
    waiting = [run for run in runs if run.status() != 0]
    running: dict[subprocess.Popen, SweepRun] = {}
    with (
        _signals() as signals,
        tempfile.TemporaryDirectory(prefix="magma_jax-") as logs,
        _ending_with_this(running),
    ):
        passed_on = False
        while running or (waiting and not signals):
            while waiting and not signals and len(running) < jobs:
                run = waiting.pop(0)
                log = _local_log(run, Path(logs))
                running[_start(run, log)] = run
                print(printable(f"{run.folder}: started, see {log}"), flush=True)
            if signals and not passed_on:
                passed_on = True
                for process in running:
                    process.terminate()
            for process in [process for process in running if process.poll() is not None]:
                run = running.pop(process)
                if object_address(run.log):
                    _write(run.log, _local_log(run, Path(logs)).read_bytes())
                run.end(process.returncode)
                print(printable(f"{run.folder}: {_ending(process.returncode)}"), flush=True)
            time.sleep(_POLL)
    statuses = [run.status() for run in runs]
    if signals or STOPPED in statuses:
        return STOPPED
    return FOUND if any(statuses) else 0


def show_table(workdir: str | Path, runs: Sequence[SweepRun]) -> None:
    """Prints one row per run, and writes it to ``sweep.txt`` and ``sweep.json``."""
    found = [{"run": run.name, **run.values, **_figures(run)} for run in runs]
    names = list(dict.fromkeys(name for row in found for name in row if name != "run"))
    rows = [names, *([_cell(row.get(name)) for name in names] for row in found)]
    table = text_table(rows, left=len(runs[0].values) + 1)
    _write(f"{workdir}/sweep.json", (json.dumps(found, indent=2) + "\n").encode())
    _write(f"{workdir}/sweep.txt", f"{table}\n".encode())
    print(printable(table))


def array_script(arguments: argparse.Namespace, count: int) -> str:
    """Script of a SLURM job array, one task per run, of the command with these arguments."""
    words = [sys.executable, "-m", "magma_jax", "sweep", "--config", arguments.config, "--workdir", arguments.workdir]
    words += [word for one in arguments.over for word in ("--over", *one)]
    words += ["--set", *arguments.set] if arguments.set else []
    command = shlex.join(map(str, words))
    # SLURM writes the log, which it cannot in object storage.
    log = "slurm-%A-%a.log" if object_address(arguments.workdir) else f"{arguments.workdir}/slurm-%a.log"
    return f"""#!/bin/bash
#SBATCH --array=0-{count - 1}
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}

srun --ntasks=1 {command} --only "$SLURM_ARRAY_TASK_ID"
status=$?
if [ "$status" = {STOPPED} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
"""


@contextlib.contextmanager
def _ending_with_this(running: dict[subprocess.Popen, SweepRun]) -> Iterator[None]:
    """Stops all runs where an error ends the sweep; otherwise its next start would train the same folders twice."""
    try:
        yield
    except BaseException:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask to stop, as they arrive."""
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _: arrived.append(received))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _local_log(run: SweepRun, temporary: Path) -> Path:
    """The file to which a run prints; one for a bucket is in ``temporary``, with what is there of an earlier start."""
    if object_address(run.log) is None:
        return Path(run.log)
    log = temporary / f"{run.name}.log"
    if not log.exists():
        with contextlib.suppress(StoreError):
            log.write_bytes(local_copy(run.log).read_bytes())
    return log


def _start(run: SweepRun, log: Path) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "magma_jax", "train", "--config", run.config, "--workdir", run.folder]
    # A session of its own: Ctrl-C reaches it through this process alone, and a second signal would end it at once.
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, "--set", *run.settings], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _write(place: str, content: bytes) -> None:
    """Writes a file or an object whole."""
    if object_address(place):
        Store(place).write("", content)
        return
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    replace_file(place, content)


def _ending(status: int | None) -> str:
    if status is None:
        return "not ended"
    return {0: "finished", STOPPED: "stopped, to be continued"}.get(status, f"failed with status {status}")


def _figures(run: SweepRun) -> dict[str, Any]:
    """How a run ended, and its figures."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(StoreError):
        lines, _ = read_lines(local_copy(f"{run.folder}/metrics.jsonl"))
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    found: dict[str, Any] = {"run ended": _ending(run.status()), "step": lines[-1]["step"] if lines else 0}
    found |= {"loss": losses[-1]} if losses else {}
    found |= {"best validation_loss": min(validated)} if validated else {}
    with contextlib.suppress(OSError, ValueError):
        results = json.loads(local_copy(f"{run.folder}/results.json").read_text())
        found |= {name: value for name, value in results.items() if isinstance(value, int | float)}
    return found


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

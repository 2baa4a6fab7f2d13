"""Worker processes that take turns: other load slows them equally, and peak memory is measured separately."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def start(script: str, name: str, options: list[str], checkout: Path | None = None) -> subprocess.Popen:
    """Starts ``script --worker NAME``, which must call ``answer``; from another checkout of the repository if given."""
    root = checkout or Path(__file__).parent.parent
    command = [sys.executable, str(root / "benchmarks" / Path(script).name), "--worker", name, *options]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(worker: subprocess.Popen, request: str) -> Any:
    """Sends a request and waits for its answer; ends the program if the worker has ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(request + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        sys.exit(f"{worker.args} ended without an answer")
    return json.loads(answer)


def end(worker: subprocess.Popen) -> float:
    """Ends a worker; returns its peak memory in gigabytes."""
    peak = ask(worker, "peak")
    worker.communicate()  # closes its input
    return peak


def answer(requests: Mapping[str, Callable[[], Any]]) -> None:
    """Answers requests on standard input until it is closed, each with a line of JSON."""
    for line in sys.stdin:
        if line.strip() == "peak":
            # Kilobytes on Linux.
            result = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
        else:
            result = requests[line.strip()]()
        print(json.dumps(result), flush=True)

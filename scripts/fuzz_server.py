"""Fuzzes a live server of a tiny model with random requests, and prints requests, responses and costs as JSON.

    PYTHONPATH=. python scripts/fuzz_server.py --seconds 3600 --seed 0

Fails if the server dies, answers with a 5xx, prints a traceback, grows in memory, or lets a client wait: the sender of
such a request, or another client that keeps asking for a few words. Request 17 of seed 0 is the same in every run:
``--only 17`` sends it alone.
"""

import argparse
import collections
import http.client
import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.serve.fuzz import case, send
from tests.serve.hostile import CHAT
from tests.serve.running import write_tiny_folder

# Timeout of a client in seconds, on a machine with other load.
WAIT = 30.0
# Allowed growth of memory after the first quarter, since malloc's caches vary. A leak of a kilobyte per request exceeds
# it in an hour.
GROWTH = 256e6


def main() -> int:
    """Reads the command line; returns 1 if something failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600, help="default: %(default)g")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=4, help="at a time; default: %(default)s")
    parser.add_argument("--only", type=int, help="the number of one request, to repeat it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_folder(Path(folder) / "tiny")
        result = _run(Path(folder), arguments)
    print(json.dumps(result, indent=1))
    return 1 if result["failures"] else 0


class _Log:
    """Results of many threads."""

    def __init__(self):
        self.failures: list[str] = []
        self.statuses: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.waited = 0.0

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print(what, file=sys.stderr)


def _run(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "magma_jax.serve", "--checkpoint", str(folder / "tiny"), "--port", str(port)]
    command += ["--slots", "4", "--body-timeout", "1", "--head-timeout", "1", "--keep-images", "16"]
    log, printed = _Log(), folder / "printed"
    with printed.open("wb") as file:
        # With one arena per thread glibc caches ever more free memory, which is not a leak.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
        server = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
    try:
        _wait_until_ready(server, port, printed)
        memory = _send_all(server, port, arguments, log)
        if server.poll() is not None:
            log.fail(f"the server ended with {server.returncode}")
    finally:
        server.terminate()
        server.wait(60)
    text = printed.read_text(errors="replace")
    if "Traceback" in text:
        log.fail("the server printed a traceback")
        print(text[text.index("Traceback") :][:10_000], file=sys.stderr)
    if memory["end"] - memory["quarter"] > GROWTH / 1e6:
        log.fail(f"the server's memory grew from {memory['quarter']} to {memory['end']} MB")
    statuses = {kind: dict(counts.most_common()) for kind, counts in log.statuses.items()}
    requests = sum(counts.total() for counts in log.statuses.values())
    waited = round(log.waited, 3)
    return {
        "failures": log.failures,
        "answers": requests,
        "statuses": statuses,
        "another_client_waited_at_most": waited,
        "memory_mb": memory,
        "printed_lines": text.count("\n"),
    }


def _send_all(server: subprocess.Popen, port: int, arguments: argparse.Namespace, log: _Log) -> dict[str, float]:
    """Sends until the time is up; returns memory in MB at the start, after a quarter of the time and at the end."""
    numbers: queue.SimpleQueue = queue.SimpleQueue()
    end = time.monotonic() + arguments.seconds
    if arguments.only is not None:
        numbers.put(arguments.only)
        numbers.put(None)
        _client(port, arguments.seed, numbers, time.monotonic() + WAIT, log)
        return {name: _memory(server.pid) for name in ("start", "quarter", "end")}
    threads = [threading.Thread(target=_other_client, args=(port, end, log))]
    for _ in range(arguments.clients):
        threads.append(threading.Thread(target=_client, args=(port, arguments.seed, numbers, end, log)))
    memory, number = {"start": _memory(server.pid)}, 0
    for thread in threads:
        thread.start()
    while time.monotonic() < end and server.poll() is None:
        while numbers.qsize() < 2 * arguments.clients:
            numbers.put(number)
            number += 1
        if "quarter" not in memory and time.monotonic() > end - 0.75 * arguments.seconds:
            memory["quarter"] = _memory(server.pid)
        time.sleep(0.01)
    for _ in threads:
        numbers.put(None)
    for thread in threads:
        thread.join()
    alive = server.poll() is None
    memory["end"] = _memory(server.pid) if alive else 0.0
    return {"quarter": memory["end"], **memory, "requests": number}


def _client(port: int, seed: int, numbers: queue.SimpleQueue, end: float, log: _Log) -> None:
    while time.monotonic() < end and (number := numbers.get()) is not None:
        sent = case(seed, number)
        try:
            found = send(port, sent, WAIT)
        except OSError as error:
            log.fail(f"request {number} ({sent.kind}): {error!r}")
            continue
        log.statuses[sent.kind].update(found or ["none"])
        if any(status >= 500 for status in found):
            log.fail(f"request {number} ({sent.kind}): {found}")


def _other_client(port: int, end: float, log: _Log) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
    while time.monotonic() < end:
        started = time.monotonic()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            status = connection.getresponse().status
            connection.close()
        except OSError as error:
            log.fail(f"another client: {error!r}")
            return
        if status != 200:
            log.fail(f"another client got {status}")
        log.waited = max(log.waited, time.monotonic() - started)
        time.sleep(0.1)


def _wait_until_ready(server: subprocess.Popen, port: int, printed: Path) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"fuzz_server.py: the server ended: {printed.read_text()[-2000:]}")


def _memory(pid: int) -> float:
    """Resident memory in MB."""
    found = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return round(int(found[0]) * 1024 / 1e6, 1)


if __name__ == "__main__":
    sys.exit(main())

"""Sends the tables of hostile requests to a live server and prints the response and cost of each, as JSON.

    PYTHONPATH=. python benchmarks/hostile_inputs.py --checkpoint runs/quickstart

First the rows of the tests, against a server with low limits: each must get its 4xx within two seconds. Slow bodies, of
requests and of fetched images, time out after one second (the server's defaults are 20 and 5). Then bodies of 32 MB,
the server's default limit. The server is a separate process and must be healthy after each row. ``waited`` is the
longest time that another client waited for ``/health`` meanwhile; ``memory`` is the peak memory of the process minus
its memory before, in MB.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn

from magma_jax import Magma
from magma_jax.inference.batching.engine import Engine, EngineConfig
from magma_jax.serve.app import create_app
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.network.connections import settings
from tests.serve.hostile import LARGE, ROWS, Row, ask, hostile_config, hostile_host

# Limits in seconds for a row, and for another client meanwhile.
LIMIT, WAIT = 2.0, 0.5
# Limit of memory for the largest body, in multiples of its size.
MEMORY = 3


def main() -> int:
    """Reads the command line; returns 1 if a row failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--only", choices=("small", "large"), help="one of the two tables")
    arguments = parser.parse_args()
    tables: dict[str, list[dict[str, Any]]] = {}
    if arguments.only != "large":
        with _server(arguments.checkpoint, low=True) as (port, pid):
            tables["small"] = [_send(port, pid, name, row) for name, row in ROWS.items()]
    if arguments.only != "small":
        with _server(arguments.checkpoint, low=False) as (port, pid):
            tables["large"] = [_send(port, pid, name, Row(build(), 0, "")) for name, build in LARGE.items()]
    summary = {name: _summary(rows) for name, rows in tables.items()}
    print(json.dumps({"summary": summary, "tables": tables}, indent=1))
    return 1 if any(table["failed"] for table in summary.values()) else 0


@contextlib.contextmanager
def _server(checkpoint: str, *, low: bool) -> Iterator[tuple[int, int]]:
    """Port and process id of a server with low limits, or with the default ones."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(checkpoint, low, theirs))
    process.start()
    assert process.pid is not None
    theirs.close()
    try:
        yield ours.recv(), process.pid
    except EOFError:
        sys.exit("hostile_inputs.py: the server did not start")
    finally:
        ours.close()
        process.join()


def _serve(checkpoint: str, low: bool, pipe: Connection) -> None:
    engine = Engine(Magma.from_checkpoint(checkpoint), EngineConfig(slots=4))
    with hostile_host() as connector:
        config = hostile_config("hostile", connector, timeout=1.0) if low else ServerConfig("hostile")
        app = create_app(engine, config)
        server = uvicorn.Server(settings(app, config, port=0, lifespan="on"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not (server.started and app.state.ready):
            time.sleep(0.05)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])
        with contextlib.suppress(EOFError):
            pipe.recv()  # until the other end is closed
        server.should_exit = True
        thread.join()


def _send(port: int, pid: int, name: str, row: Row) -> dict[str, Any]:
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak memory
    before, waits, done = _memory(pid, "VmRSS"), [0.0], threading.Event()

    def other_client() -> None:
        while not done.is_set():
            started = time.perf_counter()
            _health(port)
            waits.append(time.perf_counter() - started)
            done.wait(0.01)

    other = threading.Thread(target=other_client)
    other.start()
    started = time.perf_counter()
    status, says = ask(port, row)
    seconds = time.perf_counter() - started
    done.set()
    other.join()
    memory = _memory(pid, "VmHWM") - before
    fine = seconds < LIMIT and max(waits) < WAIT and _health(port) == "ok"
    if row.status or row.send:
        fine = fine and status == row.status and row.says in says
    else:  # a body of the largest size
        fine = fine and 400 <= status < 500 and memory < MEMORY * len(row.body) / 1e6
    cost = {"seconds": round(seconds, 3), "waited": round(max(waits), 3), "memory": round(memory, 1)}
    return {"row": name, "status": status, **cost, "fine": fine, "says": says[:100]}


def _health(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as response:
        return json.load(response)["status"]


def _memory(pid: int, name: str) -> float:
    """A line of the process's status, in MB."""
    line = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert line is not None
    return int(line[1]) * 1024 / 1e6


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    worst = {key: max(rows, key=lambda row: row[key]) for key in ("seconds", "waited", "memory")}
    most = {key: {"row": row["row"], key: row[key]} for key, row in worst.items()}
    return {"rows": len(rows), "failed": [row["row"] for row in rows if not row["fine"]], "most": most}


if __name__ == "__main__":
    sys.exit(main())

"""Sends the table of hostile requests to a live server and prints what each got and how long it took, as JSON.

    PYTHONPATH=. python benchmarks/hostile_inputs.py --checkpoint runs/quickstart

Each must get its 4xx within two seconds, and the server must be healthy after each. Bodies that come too slowly, of
requests and of fetched pictures, are given one second (the server's defaults are 20 and 5).
"""

import argparse
import json
import sys
import threading
import time
import urllib.request

import uvicorn

from magma_jax import Magma
from magma_jax.inference.engine import Engine, EngineConfig
from magma_jax.serve.app import create_app
from magma_jax.serve.connections import settings
from tests.serve.hostile import ROWS, ask, hostile_config, hostile_host

LIMIT = 2.0


def main() -> int:
    """Reads the command line; returns 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    arguments = parser.parse_args()
    model = Magma.from_checkpoint(arguments.checkpoint)
    with hostile_host() as connector:
        config = hostile_config("hostile", connector, timeout=1.0)
        app = create_app(Engine(model, EngineConfig(slots=4)), config)
        server = uvicorn.Server(settings(app, config, port=0, lifespan="on"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        rows = []
        for name, row in ROWS.items():
            started = time.perf_counter()
            status, says = ask(port, row)
            seconds = time.perf_counter() - started
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
                healthy = json.load(response)["status"] == "ok"
            fine = status == row.status and row.says in says and seconds < LIMIT and healthy
            rows.append({"row": name, "status": status, "seconds": round(seconds, 3), "fine": fine, "says": says[:100]})
        server.should_exit = True
        thread.join()
    failed = [row["row"] for row in rows if not row["fine"]]
    slowest = max(rows, key=lambda row: row["seconds"])
    summary = {"rows": len(rows), "failed": failed, "slowest": slowest["row"], "seconds": slowest["seconds"]}
    print(json.dumps({**summary, "table": rows}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

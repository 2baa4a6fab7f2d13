"""Load test: many clients on a batching server, and on a server that takes one request at a time, as JSON.

    python benchmarks/serve_load.py --checkpoint runs/quickstart --images FOLDER

Clients send streamed chat completions over loopback: a random image or none, a random prompt, sampled or greedy; one in
ten disconnects in the middle of its answer. An answer has a random number of tokens, enforced with ``min_tokens``,
since the model's own answers have the length of its training data. Both servers get the same load. Clients and server
share the machine. ``memory_growth`` is the server's resident memory at the end divided by that after a quarter of the
time; ``programs`` counts those that were compiled, or read from the cache, after the start.
"""

import argparse
import base64
import http.client
import io
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Minimum and maximum tokens of an answer, uniformly distributed.
LENGTHS = (4, 48)

WORDS = (
    "a",
    "picture",
    "of",
    "the",
    "red",
    "blue",
    "small",
    "old",
    "who",
    "what",
    "where",
    "is",
    "this",
    "and",
    "flag",
)


def main() -> int:
    """Reads the command line; returns 1 if a request failed with anything but 429, or a program was compiled."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", type=Path, help="folder of PNG files; default: sampled at random")
    parser.add_argument("--clients", type=int, default=32, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="of each of both runs; default %(default)s")
    parser.add_argument("--slots", type=int, default=32, help="of the server that batches; default %(default)s")
    parser.add_argument("--port", type=int, default=8123, help="default %(default)s")
    arguments = parser.parse_args()
    images = [_data_uri(image) for image in _images(arguments.images)]
    batched, single = (_load(arguments, slots, images) for slots in (arguments.slots, 1))
    lengths = f"{LENGTHS[0]} to {LENGTHS[1]} new tokens, evenly sampled; min_tokens = max_tokens"
    ratio = round(batched["tokens_per_second"] / single["tokens_per_second"], 2)
    print(json.dumps({"lengths": lengths, "batched": batched, "one at a time": single, "ratio": ratio}, indent=1))
    return int(any(result["failures"] or result["programs"] for result in (batched, single)))


def _load(arguments: argparse.Namespace, slots: int, images: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "magma_jax.serve", "--checkpoint", arguments.checkpoint, "--slots", str(slots)]
    command += ["--template", "raw"]
    server = subprocess.Popen([*command, "--port", str(arguments.port)])
    try:
        while not _healthy(arguments.port):
            if server.poll() is not None:
                sys.exit("serve_load.py: the server ended")
            time.sleep(0.2)
        before, started = _metrics(arguments.port), time.monotonic()
        end = started + arguments.seconds
        log: list[dict[str, Any]] = []
        threads = [
            threading.Thread(target=_client, args=(arguments.port, random.Random(i), images, end, log))
            for i in range(arguments.clients)
        ]
        for thread in threads:
            thread.start()
        time.sleep(arguments.seconds / 4)
        warm = _metrics(arguments.port)
        for thread in threads:
            thread.join()
        after, seconds = _metrics(arguments.port), time.monotonic() - started
    finally:
        server.terminate()
        server.wait()

    def counted(name: str) -> float:
        return after[f"magma_{name}_total"] - before[f"magma_{name}_total"]

    first = sorted(entry["first"] for entry in log if entry.get("first"))
    speeds = [entry["speed"] for entry in log if entry.get("speed")]
    statuses = [entry["status"] for entry in log]
    memory = "process_resident_memory_bytes"
    return {
        "slots": slots,
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "requests": len(log),
        "left_in_the_middle": sum(entry.get("left", False) for entry in log),
        "busy_429": statuses.count(429),
        "failures": sorted({str(status) for status in statuses if status not in (200, 429)}),
        "programs": int(counted("programs")),
        "memory_growth": round(after[memory] / warm[memory], 3),
        "memory_gb": round(after[memory] / 1e9, 2),
        "tokens_per_second": round(counted("new_tokens") / seconds, 1),
        "new_tokens": int(counted("new_tokens")),
        "images_encoded": int(counted("images_encoded")),
        "prompt_tokens_reused": round(counted("reused_tokens") / counted("prompt_tokens"), 3),
        "first_token_seconds_p50": round(first[len(first) // 2], 3),
        "first_token_seconds_p95": round(first[int(0.95 * len(first))], 3),
        "tokens_per_second_of_a_request_p50": round(statistics.median(speeds), 1),
    }


def _client(port: int, rng: random.Random, images: list[str], end: float, log: list[dict[str, Any]]) -> None:
    while time.monotonic() < end:
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if rng.random() < 0.8:
            content.insert(0, {"type": "image_url", "image_url": {"url": rng.choice(images)}})
        length = rng.randint(*LENGTHS)
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": length,
            "min_tokens": length,
            "temperature": rng.choice([0, 0.7]),
            "stream": True,
            "return_token_ids": True,
        }
        leaves = rng.randint(1, 8) if rng.random() < 0.1 else None
        try:
            log.append(_ask(port, body, leaves))
        except (OSError, http.client.HTTPException) as error:
            log.append({"status": repr(error)})


def _ask(port: int, body: dict[str, Any], leaves: int | None) -> dict[str, Any]:
    """One request; disconnects after ``leaves`` tokens unless that is None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    start = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    entry: dict[str, Any] = {"status": response.status}
    tokens = 0
    try:
        for line in response:
            if response.status != 200 or not line.startswith(b"data: {"):
                continue
            choice = (json.loads(line[6:]).get("choices") or [{}])[0]
            if choice.get("token_ids"):
                tokens += len(choice["token_ids"])
                entry.setdefault("first", time.monotonic() - start)
                if leaves is not None and tokens >= leaves:
                    return entry | {"left": True}
    finally:
        connection.close()
    if tokens > 1:
        entry["speed"] = (tokens - 1) / max(time.monotonic() - start - entry["first"], 1e-6)
    return entry


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def _metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in re.findall(r"^(\w+) ([\d.e+-]+)$", "\n".join(lines), re.M)}


def _images(folder: Path | None) -> list[Image.Image]:
    if folder is not None:
        return [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))[:64]]
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(64)]


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())

"""Converts a published checkpoint, serves it, and asks it about an image.

    python examples/convert_and_serve.py mp_rank_00_model_states.pt models/magma image.png "A picture of"

The server runs until Ctrl-C; http://127.0.0.1:8000 is a page to try the model.
"""

import argparse
import base64
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from magma_jax.convert.magma_checkpoint import from_torch


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, converts, serves and asks."""
    parser = argparse.ArgumentParser(description="Converts a published checkpoint, serves it, and asks it once.")
    parser.add_argument("checkpoint", help=".pt or .safetensors")
    parser.add_argument("folder", type=Path, help="model folder to write; kept and used again if it is there")
    parser.add_argument("image", type=Path)
    parser.add_argument("text")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    arguments = parser.parse_args(argv)

    if not arguments.folder.exists():
        from_torch(arguments.checkpoint, arguments.folder)

    server = subprocess.Popen(
        [sys.executable, "-m", "magma_jax.serve", "--checkpoint", str(arguments.folder), "--port", str(arguments.port)]
    )
    try:
        url = f"http://127.0.0.1:{arguments.port}"
        while server.poll() is None and not answers(url):
            time.sleep(0.5)
        print(ask(url, arguments.image, arguments.text), flush=True)
        if not arguments.once:
            server.wait()
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    """Whether the server has compiled its programs and accepts requests."""
    try:
        return urllib.request.urlopen(f"{url}/health").status == 200
    except OSError:  # not listening yet, or 503 while it starts
        return False


def ask(url: str, image: Path, text: str) -> str:
    """The answer to one message, through OpenAI's chat completions API."""
    uri = f"data:image/{image.suffix[1:].lower()};base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 20, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]["content"]


if __name__ == "__main__":
    main()

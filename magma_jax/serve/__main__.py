"""Serves a checkpoint.

    python -m magma_jax.serve --checkpoint runs/quickstart
    python -m magma_jax.serve --checkpoint runs/quickstart --host 0.0.0.0 --api-key-file key.txt

OpenAI's API at /v1/chat/completions and /v1/completions, a web page to try the model at /, /health and /metrics.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from magma_jax import commands
from magma_jax.inference.batching.config import EngineConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal stops it; returns the exit status, see ``commands``; 1 if the engine could not start."""
    started = time.perf_counter()
    arguments = _parser().parse_args(argv)

    def work() -> int:
        try:
            from magma_jax.serve.command import run
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("magma_jax"):
                raise
            packages = "fastapi uvicorn prometheus_client jinja2"
            raise ValueError(f"{error.name} is missing; pip install {packages}") from None
        return run(arguments, started)

    return commands.run("magma_jax.serve", work)


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(prog="python -m magma_jax.serve", description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="run folder, model folder, or PyTorch checkpoint")
    parser.add_argument("--name", help="of the model in the API; default: the checkpoint's")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--no-program-cache", action="store_true", help="compile anew, whatever earlier starts have kept"
    )
    parser.add_argument("--dtype", help="of weights and activations, such as bfloat16")
    parser.add_argument(
        "--slots", type=int, default=EngineConfig.slots, help="requests at a time; default: %(default)s"
    )
    parser.add_argument("--context", type=int, help="positions of a request; default: the model's")
    parser.add_argument(
        "--keep-images",
        type=int,
        default=EngineConfig.images,
        help="encoded images that are kept for further questions; default: %(default)s",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=EngineConfig.steps,
        help="tokens between two looks at the queue; default: %(default)s",
    )
    parser.add_argument("--queue", type=int, default=EngineConfig.queue, help="waiting at most; default: %(default)s")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a request may take; default: %(default)s")
    parser.add_argument(
        "--head-timeout", type=float, default=10.0, help="seconds until a request must begin; default: %(default)s"
    )
    parser.add_argument("--body-timeout", type=float, default=20.0, help="seconds to arrive; default: %(default)s")
    parser.add_argument(
        "--send-timeout", type=float, default=30.0, help="seconds to read what waits for a client; default: %(default)s"
    )
    parser.add_argument(
        "--grace", type=float, default=25.0, help="seconds left to requests after SIGTERM; default: %(default)s"
    )
    parser.add_argument("--connections", type=int, default=1000, help="at a time; default: %(default)s")
    parser.add_argument(
        "--allow-host", nargs="*", default=[], help="further names that the server is called by; * for any"
    )
    parser.add_argument("--no-reuse", action="store_true", help="requests share no work, see the docs")
    parser.add_argument("--api-key-file", type=Path, help="file with the key that every route but /health asks for")
    parser.add_argument("--open-metrics", action="store_true", help="/metrics answers without the key")
    parser.add_argument("--cors", nargs="*", default=[], metavar="ORIGIN", help="web pages that may use it; * for all")
    parser.add_argument("--root-path", default="", help="prefix of all routes, where a proxy puts the server below one")
    parser.add_argument("--log-requests", action="store_true", help="a line for every request, to standard error")
    parser.add_argument(
        "--template",
        metavar="NAME|FILE",
        help="wording that messages are put into: raw, qa or a Jinja file; default: the checkpoint's",
    )
    parser.add_argument(
        "--cut-max-tokens",
        action="store_true",
        help="answer with what the context has left where max_tokens is more, in place of an error",
    )
    parser.add_argument("--max-images", type=int, default=16, help="in a request; default: %(default)s")
    parser.add_argument(
        "--image-seconds",
        type=float,
        default=1.5,
        help="of processor time that decoding one image may take; default: %(default)s",
    )
    parser.add_argument("--folder", type=Path, help="images below it may be named by file: URLs")
    parser.add_argument("--allow-domain", nargs="*", default=[], help="hosts that images are fetched from")
    parser.add_argument("--fetch-timeout", type=float, default=5.0, help="seconds of a fetch; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())

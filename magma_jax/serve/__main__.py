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
from magma_jax.retrieval.arguments import add_memory


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
            packages = "fastapi uvicorn prometheus_client jinja2 python-multipart"
            raise ValueError(f"{error.name} is missing; pip install {packages}") from None
        return run(arguments, started)

    return commands.run("magma_jax.serve", work)


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(prog="python -m magma_jax.serve", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=commands.source,
        help="run folder, model folder, or PyTorch checkpoint, also gs://, s3:// and hf:// addresses",
    )
    parser.add_argument("--name", help="model name in the API; default: the checkpoint's")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, only this machine")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--no-program-cache", action="store_true", help="do not use programs cached by earlier starts")
    parser.add_argument("--dtype", help="dtype of weights and activations, such as bfloat16")
    parser.add_argument(
        "--slots", type=int, default=EngineConfig.slots, help="concurrent requests; default: %(default)s"
    )
    parser.add_argument("--context", type=int, help="positions per request; default: the model's")
    parser.add_argument(
        "--keep-images",
        type=int,
        default=EngineConfig.images,
        help="encoded images kept for further questions; default: %(default)s",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=EngineConfig.steps,
        help="tokens between checks of the queue; default: %(default)s",
    )
    parser.add_argument(
        "--queue", type=int, default=EngineConfig.queue, help="maximum of waiting requests; default: %(default)s"
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a request; default: %(default)s")
    parser.add_argument(
        "--head-timeout", type=float, default=10.0, help="seconds for a request head to arrive; default: %(default)s"
    )
    parser.add_argument(
        "--body-timeout", type=float, default=20.0, help="seconds for a body to arrive; default: %(default)s"
    )
    parser.add_argument(
        "--send-timeout",
        type=float,
        default=30.0,
        help="seconds for a client to read pending data; default: %(default)s",
    )
    parser.add_argument(
        "--grace", type=float, default=25.0, help="seconds for running requests after SIGTERM; default: %(default)s"
    )
    parser.add_argument("--connections", type=int, default=1000, help="maximum number; default: %(default)s")
    parser.add_argument("--allow-host", nargs="*", default=[], help="further allowed names of the server; * for any")
    parser.add_argument("--no-reuse", action="store_true", help="requests share no work, see the docs")
    parser.add_argument("--api-key-file", type=Path, help="file with the key required on every route but /health")
    parser.add_argument("--open-metrics", action="store_true", help="/metrics needs no key")
    parser.add_argument(
        "--cors",
        nargs="*",
        default=[],
        metavar="ORIGIN",
        help="origins of web pages that may use the server; * for all",
    )
    parser.add_argument("--root-path", default="", help="prefix of all routes behind a proxy")
    parser.add_argument("--log-requests", action="store_true", help="one line per request on standard error")
    parser.add_argument(
        "--template",
        metavar="NAME|FILE",
        help="chat template: raw, qa or a Jinja file; default: the checkpoint's",
    )
    parser.add_argument(
        "--cut-max-tokens",
        action="store_true",
        help="reduce max_tokens to the rest of the context instead of refusing the request",
    )
    parser.add_argument("--max-images", type=int, default=16, help="maximum per request; default: %(default)s")
    parser.add_argument(
        "--image-seconds",
        type=float,
        default=1.5,
        help="CPU time limit for decoding an image; default: %(default)s",
    )
    parser.add_argument("--folder", type=Path, help="folder whose images may be named by file: URLs")
    parser.add_argument("--allow-domain", nargs="*", default=[], help="hosts from which images are fetched")
    parser.add_argument("--fetch-timeout", type=float, default=5.0, help="seconds for a fetch; default: %(default)s")
    add_memory(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())

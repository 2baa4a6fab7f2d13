"""Serves a checkpoint.

    python -m magma_jax.serve --checkpoint runs/quickstart
    python -m magma_jax.serve --checkpoint runs/quickstart --host 0.0.0.0 --api-key-file key.txt

OpenAI's shapes at /v1/chat/completions and /v1/completions, a page to try the model at /, /health and /metrics.
"""

import argparse
import contextlib
import gc
import os
import sys
import time
from pathlib import Path

from magma_jax.inference.api import Magma
from magma_jax.inference.batching.engine import Engine, EngineConfig
from magma_jax.output import error_line
from magma_jax.runtime.compile import enable_compilation_cache
from magma_jax.storage.hub import local_path


def main() -> None:
    """Reads the command line, loads and serves until it is told to stop."""
    try:
        import uvicorn

        from magma_jax.serve.app import create_app
        from magma_jax.serve.config import ServerConfig
        from magma_jax.serve.network.connections import settings
        from magma_jax.serve.network.listen import listen
        from magma_jax.serve.network.request_log import RequestLog
        from magma_jax.serve.prompts.fetch import FetchRules
        from magma_jax.serve.prompts.images import ImageRules
        from magma_jax.serve.prompts.templates import templates_for
    except ModuleNotFoundError as error:
        sys.exit(f"magma_jax.serve: {error.name} is missing; pip install fastapi uvicorn prometheus_client jinja2")
    arguments, started = _parser().parse_args(), time.perf_counter()
    enable_compilation_cache(not arguments.no_program_cache)
    try:
        key = arguments.api_key_file.read_text().strip() if arguments.api_key_file else None
        if key == "":
            raise ValueError(f"{arguments.api_key_file}: holds no key")
        sockets = listen(arguments.host, arguments.port)
        fetch = (
            FetchRules(tuple(arguments.allow_domain), timeout=arguments.fetch_timeout)
            if arguments.allow_domain
            else None
        )
        rules = ImageRules(arguments.max_images, seconds=arguments.image_seconds, folder=arguments.folder, fetch=fetch)
        config = ServerConfig(
            arguments.name or name_of(arguments.checkpoint),
            key,
            timeout=arguments.timeout,
            head_timeout=arguments.head_timeout,
            body_timeout=arguments.body_timeout,
            send_timeout=arguments.send_timeout,
            grace=arguments.grace,
            connections=arguments.connections,
            hosts=(*(name.lower() for name in arguments.allow_host), arguments.host.lower()),
            images=rules,
            open_metrics=arguments.open_metrics,
            origins=tuple(arguments.cors),
            root_path=root_path_of(arguments.root_path),
            templates=templates_for(local_path(arguments.checkpoint), arguments.template),
            cut_max_tokens=arguments.cut_max_tokens,
        )
        sizes = EngineConfig(
            arguments.slots,
            arguments.context,
            arguments.keep_images,
            arguments.steps,
            arguments.queue,
            reuse=not arguments.no_reuse,
        )
        model = Magma.from_checkpoint(arguments.checkpoint, dtype=arguments.dtype)
        engine = Engine(model, sizes)
    except (ValueError, OSError) as error:  # the package's own errors are ValueErrors
        print(f"magma_jax.serve: {error_line(error)}", file=sys.stderr)
        sys.exit(2)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{host}:{sockets[0].getsockname()[1]}{config.root_path}"
    outcome: list[Exception | None] = []

    def begun(error: Exception | None) -> None:
        outcome.append(error)
        if error is None:
            gc.collect()
            gc.freeze()  # what is there now stays; to walk through it takes the time of many requests
            seconds, template = time.perf_counter() - started, config.templates.default
            says = f"serving {config.model} on {address}, template {template}; ready after {seconds:.0f} s"
        else:
            says = f"the engine cannot start ({type(error).__name__}: {error_line(error):.300})"
            server.should_exit = True
        print(f"magma_jax.serve: {says}", file=sys.stderr, flush=True)

    app = create_app(engine, config, begun)
    if arguments.log_requests:
        app.add_middleware(RequestLog)
    server = uvicorn.Server(settings(app, config))
    with contextlib.suppress(KeyboardInterrupt):  # raised once more after everything has ended
        server.run(sockets=sockets)
    if not outcome:  # compiling cannot be interrupted, and to end would be to wait for it
        sys.stderr.flush()
        os._exit(0)
    if outcome[0] is not None:
        sys.exit(1)


def name_of(checkpoint: str) -> str:
    """What a model is called by default: the last part of its path."""
    if checkpoint.startswith("hf://"):
        return Path(checkpoint).name
    return Path(os.path.abspath(checkpoint)).name or "magma"


def root_path_of(path: str) -> str:
    """A prefix of routes as the application wants it: a slash in front and none behind; empty for none."""
    path = path.strip("/")
    return f"/{path}" if path else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m magma_jax.serve", description=__doc__.splitlines()[0])
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
    main()

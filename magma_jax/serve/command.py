"""Implementation of ``python -m magma_jax.serve``."""

import argparse
import contextlib
import gc
import os
import socket
import sys
import time
from pathlib import Path

import uvicorn

from magma_jax.families import open_generator
from magma_jax.inference.batching.config import EngineConfig
from magma_jax.inference.batching.engine import Engine
from magma_jax.inference.generator import ImageGenerator, TokenGenerator
from magma_jax.inference.image_queue import ImageQueue
from magma_jax.output import error_line, object_address
from magma_jax.retrieval.arguments import with_memory
from magma_jax.runtime.compile import enable_compilation_cache
from magma_jax.serve.app import create_app
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.network.connections import settings
from magma_jax.serve.network.listen import listen
from magma_jax.serve.network.request_log import RequestLog
from magma_jax.serve.prompts.fetch import FetchRules
from magma_jax.serve.prompts.images import ImageRules
from magma_jax.serve.prompts.templates import templates_for
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import CheckpointError


def run(arguments: argparse.Namespace, started: float) -> int:
    """Serves until a signal stops it; returns 1 if the engine could not start.

    Args:
        arguments: command line arguments.
        started: start of the command, by ``time.perf_counter``.

    Raises:
        ValueError, OSError: one-line errors before the server starts.
    """
    enable_compilation_cache(not arguments.no_program_cache)
    key = arguments.api_key_file.read_text().strip() if arguments.api_key_file else None
    if key == "":
        raise ValueError(f"{arguments.api_key_file}: holds no key")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(one) for one in listen(arguments.host, arguments.port)]
        return _serve(arguments, key, sockets, started)


def _serve(arguments: argparse.Namespace, key: str | None, sockets: list[socket.socket], started: float) -> int:
    fetch = (
        FetchRules(tuple(arguments.allow_domain), timeout=arguments.fetch_timeout) if arguments.allow_domain else None
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
    engine = _engine(arguments)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{host}:{sockets[0].getsockname()[1]}{config.root_path}"
    outcome: list[Exception | None] = []

    def begun(error: Exception | None) -> None:
        outcome.append(error)
        if error is None:
            gc.collect()
            gc.freeze()  # excludes permanent objects from collections, which would take as long as many requests
            template = f", template {config.templates.default}" if isinstance(engine, Engine) else ""
            seconds = time.perf_counter() - started
            says = f"serving {config.model} on {address}{template}; ready after {seconds:.0f} s"
        else:
            says = f"the engine cannot start ({type(error).__name__}: {error_line(error):.300})"
            server.should_exit = True
        print(f"magma_jax.serve: {says}", file=sys.stderr, flush=True)

    app = create_app(engine, config, begun)
    if arguments.log_requests:
        app.add_middleware(RequestLog)
    server = uvicorn.Server(settings(app, config))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after shutdown
        server.run(sockets=sockets)
    if not outcome:  # a regular exit would wait for the compilation, which cannot be interrupted
        sys.stderr.flush()
        os._exit(0)
    return 0 if outcome[0] is None else 1


def _engine(arguments: argparse.Namespace) -> Engine | ImageQueue:
    """What answers the requests: an engine for a model that writes, a queue for one that draws.

    Raises:
        CheckpointError: a model that does neither. Also the errors of opening a checkpoint.
    """
    model = with_memory(open_generator(arguments.checkpoint, dtype=arguments.dtype), arguments)
    if isinstance(model, TokenGenerator):
        sizes = EngineConfig(
            slots=arguments.slots,
            context=arguments.context,
            images=arguments.keep_images,
            steps=arguments.steps,
            queue=arguments.queue,
            reuse=not arguments.no_reuse,
        )
        return Engine(model, sizes)
    if isinstance(model, ImageGenerator) and "image" in model.makes:
        return ImageQueue(model, arguments.queue, slots=arguments.slots, context=arguments.context)
    raise CheckpointError(
        f"{arguments.checkpoint}: neither writes text token by token nor draws images; a model that draws "
        "needs its image tokenizer"
    )


def name_of(checkpoint: str) -> str:
    """Default name of a model: the last component of its path."""
    if checkpoint.startswith("hf://") or object_address(checkpoint):
        return Path(checkpoint).name
    return Path(os.path.abspath(checkpoint)).name or "magma"


def root_path_of(path: str) -> str:
    """Normalises a route prefix: leading slash, no trailing slash; empty for none."""
    path = path.strip("/")
    return f"/{path}" if path else ""

"""A server of a tiny model on a free port, for tests that talk to one."""

import dataclasses
import threading
import time

import httpx
import uvicorn
from flax import nnx
from PIL import Image

from magma_jax import Magma
from magma_jax.config import to_dict
from magma_jax.data.images import ImageInput
from magma_jax.inference.batching.engine import Engine, EngineConfig
from magma_jax.inference.image_queue import ImageQueue
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from magma_jax.serve import attention_route
from magma_jax.serve.app import create_app
from magma_jax.serve.network.connections import settings
from magma_jax.serve.prompts.images import ImageRules, data_uri
from magma_jax.storage.model_folder import write_model_folder
from tests import tiny

SIZES = EngineConfig(slots=3, context=64, images=4, steps=4)  # with fewer than four slots prompts go one by one
RULES = ImageRules(max_images=3, max_bytes=100_000, max_pixels=1_000_000)


def tiny_model():
    """Random weights, large enough for answers to differ."""
    params = split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1]
    return Magma(tiny.MODEL, {k: 4 * v if v.ndim > 1 else v for k, v in params.items()}, tiny.dataset().tokenizer)


def write_tiny_folder(path):
    """A model folder of such weights, with some more context, for a server in a process of its own."""
    config = dataclasses.replace(tiny.MODEL, lm=dataclasses.replace(tiny.MODEL.lm, context_length=128))
    params = split(MagmaModel(config, rngs=nnx.Rngs(0)))[1]
    tokenizer = tiny.dataset().tokenizer
    write_model_folder(path, {"model": to_dict(config)}, params, lambda made: tokenizer.save(made / "tokenizer"))


class Running:
    """A server on a free port, in a thread; ``ready=False`` for one that may still be starting.

    ``model`` is a model of texts, or a queue of images.
    """

    def __init__(self, model, config, sizes=SIZES, *, ready=True):
        self.engine = model if isinstance(model, ImageQueue) else Engine(model, sizes)
        self.app = create_app(self.engine, config)
        self.server = uvicorn.Server(settings(self.app, config, port=0, lifespan="on"))
        self.server.install_signal_handlers = lambda: None
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        if ready:
            self.wait()
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def wait(self):
        while not (self.app.state.ready or self.app.state.failure):
            time.sleep(0.01)

    def warm_up(self):
        """Compiles what the first warm-up did, if the process has forgotten its programs since."""
        self.engine.warmup()
        attention_route.warm_up(self.engine)

    def get(self, route):
        return self.http.get(route)

    def chat(self, **body):
        return self.post("/v1/chat/completions", **{"messages": user("a"), **body})

    def post(self, route, **body):
        return self.http.post(route, json=body)

    def stop(self):
        self.http.close()
        self.server.should_exit = True
        self.thread.join()


def square(name):
    return Image.new("RGB", (64, 64), tiny.COLOURS[name])


def user(*parts):
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_uri(part)}}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def expected(model, *prompt, steps=12):
    items = [item if isinstance(item, str) else ImageInput(item) for item in prompt]
    return model.generate(model.preprocess_inputs(items), max_steps=steps, temperature=0.0)[0]

"""One server and one browser for all tests that do not change them: they take long to start."""

import logging

import pytest

from magma_jax.inference.image_queue import ImageQueue
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.prompts.images import ImageRules
from tests.serve.drawing import Drawer
from tests.serve.hostile import hostile_config, hostile_host
from tests.serve.running import Running, tiny_model


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def server(model):
    with hostile_host() as connector:
        running = Running(model, hostile_config("tiny", connector, timeout=0.8))
        yield running
        running.stop()


@pytest.fixture(scope="session")
def drawer():
    return Drawer()


@pytest.fixture(scope="session")
def drawing(drawer):
    """A server of a model that draws."""
    config = ServerConfig("drawer", timeout=2, images=ImageRules(max_bytes=100_000, max_pixels=1_000_000))
    running = Running(ImageQueue(drawer, 4), config)
    yield running
    running.stop()


@pytest.fixture
def printed(caplog):
    """What servers log while a test runs; uvicorn keeps it from all other loggers."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(caplog.handler)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def browser():
    from tests.serve.browser import MISSING, chromium

    if MISSING:
        pytest.skip(MISSING)
    with chromium() as driver:
        yield driver

"""One server for all tests that do not change it: it takes long to compile."""

import pytest

from magma_jax.serve.app import ServerConfig
from tests.serve.running import RULES, Running, tiny_model


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def server(model):
    running = Running(model, ServerConfig(model="tiny", timeout=20, pictures=RULES, max_body_bytes=1_000_000))
    yield running
    running.stop()

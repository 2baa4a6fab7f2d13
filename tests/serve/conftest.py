"""One server and one browser for all tests that do not change them: they take long to start."""

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


@pytest.fixture(scope="session")
def browser():
    from tests.serve.browser import MISSING, chromium

    if MISSING:
        pytest.skip(MISSING)
    with chromium() as driver:
        yield driver

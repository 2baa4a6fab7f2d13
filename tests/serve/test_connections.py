"""Clients that say nothing, read nothing or never come to an end, and what is left of them."""

import contextlib
import gc
import json
import socket
import time

import pytest

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.network import connections
from magma_jax.serve.requests.schema import ChatRequest
from tests.serve.running import RULES, Running, user

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def start(model, **changes):
    config = ServerConfig(model="tiny", images=RULES, **{"head_timeout": 0.4, "send_timeout": 0.4, **changes})
    return Running(model, config)


@pytest.fixture(scope="module")
def running(model):
    server = start(model)
    yield server
    server.stop()


def connect(server, receive=None):
    connection = socket.socket()
    if receive is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    return connection


def is_closed(connection):
    """Waits until the server has closed the connection; what it sent before does not count."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    return True


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(**body):
    content = json.dumps({"messages": user("a"), **body}).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content


@pytest.mark.parametrize(
    "said",
    [
        pytest.param([], id="nothing"),
        pytest.param([HEAD], id="half a head"),
        pytest.param([ask(max_tokens=1), HEAD], id="half a second head"),
        pytest.param([b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"], id="half a body"),
    ],
)
def test_connections_without_a_request_are_closed(running, said, monkeypatch):
    monkeypatch.setattr(connections, "KEEP_ALIVE", 0)
    with connect(running) as connection:
        for piece in said:
            connection.sendall(piece)
        assert is_closed(connection)
    wait_for(lambda: not running.server.server_state.connections)


def test_silent_connections_give_way(model):
    server = start(model, connections=20, head_timeout=60)
    try:
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(connect(server)) for _ in range(20)]
            wait_for(lambda: len(server.server.server_state.connections) == 20)
            with connect(server) as refused:  # nobody has been silent for long
                assert b"503 " in refused.recv(100)
            time.sleep(connections._IDLE)
            assert [server.chat(max_tokens=1).status_code for _ in range(3)] == [200] * 3
            # httpx keeps one connection: of the silent ones the first is gone.
            assert is_closed(silent[0])
            silent[1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in silent[1].recv(100)
    finally:
        server.stop()


LONG = {"max_tokens": 60, "min_tokens": 60, "n": 8, "logprobs": True, "top_logprobs": 20, "temperature": 50.0}


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_reads(running, stream):
    """Its connection goes, and the request with it; the text of a request goes before."""
    state = running.server.server_state
    wait_for(lambda: not state.connections)
    texts = [{"type": "text", "text": ""}] * 5_000 + [{"type": "text", "text": "a"}]
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(connect(running, receive=2048))
            connection.sendall(ask(**LONG, stream=stream, messages=[{"role": "user", "content": texts}]))
        wait_for(lambda: running.engine.stats().running)
        wait_for(lambda: not any(type(one) is ChatRequest and one.messages for one in gc.get_objects()))
        wait_for(lambda: not state.connections and not state.tasks)
    assert running.engine.stats()[:2] == (0, 0)


def test_told_to_stop_the_server_waits_for_readers_only(model):
    server = start(model, send_timeout=600, grace=0.5)
    with connect(server, receive=2048) as connection, connect(server):
        connection.sendall(ask(**LONG, stream=True))
        wait_for(lambda: server.engine.stats().finished == 8)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 20


def test_told_to_stop_the_server_ends_what_is_running(model, printed):
    """A request that would take longer than the grace is told so; nothing is logged as a fault of the server."""
    server = start(model, grace=0.3)
    with connect(server) as connection, server.engine.paused():
        connection.sendall(ask(max_tokens=5))
        wait_for(lambda: server.engine.stats().waiting)
        server.stop()
        answer = connection.recv(65536)
    assert b" 503 " in answer
    assert b"shutting down" in answer
    assert "Traceback" not in printed()


@pytest.mark.parametrize("method", [b"POST", b"HEAD"])
def test_a_body_that_breaks_while_the_answer_is_on_its_way(running, method, printed):
    with connect(running) as connection:
        start = method + b" /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(start + b"no length\r\n")
        assert b" 400 " in connection.recv(65536)
        assert is_closed(connection)
    assert running.http.get("/health").status_code == 200
    assert "Traceback" not in printed()


def test_connections_are_no_more_than_files_may_be_open(monkeypatch):
    limits = [(300, 300)]
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, new: limits.append(new))
    assert 1 <= connections.room_for_connections(1_000) < 200
    limits.append((300, 100_000))  # may be raised
    assert connections.room_for_connections(1_000) == 1_000
    assert 1_000 < limits[-1][0] < 2_000
    limits.append((30, 30))
    assert connections.room_for_connections(1_000) == 1

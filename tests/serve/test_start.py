"""How a server starts, and who may ask what of it: health, key, web pages of others, a prefix, sockets, the log."""

import asyncio
import errno
import socket
import subprocess
import sys
import threading

import pytest

from magma_jax.serve.command import name_of, root_path_of
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.network.listen import listen
from magma_jax.serve.network.request_log import RequestLog
from tests.serve.running import RULES, Running

KEY = {"Authorization": "Bearer secret"}
PAGE = "https://page.example"


@pytest.fixture
def starting(model, monkeypatch):
    """A server that compiles until it is let go on, and then fails if it is told an error."""
    goes_on, errors = threading.Event(), []

    def warm_up(engine):
        assert goes_on.wait(60)
        if errors:
            raise errors[0]

    monkeypatch.setattr("magma_jax.inference.batching.engine.Engine.warmup", warm_up)
    monkeypatch.setattr("magma_jax.serve.service.attention_warm_up", lambda engine: None)
    config = ServerConfig(
        model="tiny", api_key="secret", images=RULES, open_metrics=True, origins=(PAGE,), root_path="/below"
    )
    running = Running(model, config, ready=False)
    try:
        yield running, goes_on, errors
    finally:
        goes_on.set()
        running.stop()


def test_health_answers_while_programs_are_compiled(starting):
    running, goes_on, _ = starting
    http = running.http
    assert (http.get("/health").status_code, http.get("/health").json()) == (503, {"status": "starting"})
    assert http.get("/metrics").status_code == 200
    for answer in (http.get("/v1/models", headers=KEY), http.post("/v1/chat/completions", json={}, headers=KEY)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "starting")
        assert answer.headers["retry-after"] == "1"
    goes_on.set()
    running.wait()
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/v1/models", headers=KEY).json()["data"][0]["id"] == "tiny"
    # The key is asked for, but of health and, by the option, of metrics.
    assert http.get("/v1/models").status_code == 401
    assert http.get("/").status_code == 401
    assert http.get("/health/").status_code in (401, 307)
    # Routes are found below the prefix and without it, the key is asked for either way.
    assert http.get("/below/health").json() == {"status": "ok"}
    assert http.get("/below/v1/models").status_code == 401
    assert http.get("/below/v1/models", headers=KEY).status_code == 200
    assert http.get("/below/below/health").status_code == 401
    there = http.get("/below", headers=KEY)
    assert (there.status_code, there.headers["location"]) == (307, f"{running.url}/below/")


def test_web_pages_of_others_may_ask_if_they_are_named(starting):
    running, goes_on, _ = starting
    goes_on.set()
    running.wait()

    def may(origin):
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        answer = running.http.options("/v1/chat/completions", headers={"Origin": origin, **asks})
        return answer.status_code, answer.headers.get("access-control-allow-origin")

    assert may(PAGE) == (200, PAGE)
    assert may("https://other.example") == (400, None)
    refused = running.http.get("/v1/models", headers={"Origin": PAGE})  # which the page can read
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


def test_no_web_page_is_told_that_it_may_ask(server):
    for method in ("GET", "OPTIONS"):
        answer = server.http.request(method, "/v1/models", headers={"Origin": PAGE})
        assert "access-control-allow-origin" not in answer.headers


def test_an_engine_that_cannot_start_says_so(starting):
    running, goes_on, errors = starting
    errors.append(MemoryError("no room"))
    goes_on.set()
    running.wait()
    answer = running.http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")
    assert "the engine cannot start (MemoryError: no room)" in answer.json()["reason"]
    assert running.http.get("/v1/models", headers=KEY).status_code == 503


def test_a_port_in_use_is_found_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "magma_jax.serve", "--checkpoint", str(tmp_path), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        with pytest.raises(OSError, match="choose another --port"):
            listen("127.0.0.1", port)
    # Else it would say that the folder holds no model.
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


def test_sockets():
    (free,) = listen("127.0.0.1", 0)
    with free, socket.create_connection(free.getsockname()[:2]):
        assert free.getsockname()[1] > 0
    with pytest.raises(OSError, match="no address of this machine"):
        listen("no.such.host.invalid", 0)
    both = listen("", 0)  # of IPv4 and IPv6, where the machine has both
    assert len({made.getsockname()[1] for made in both}) == 1
    for made in both:
        made.close()


def test_a_socket_that_fails_leaves_none_open(monkeypatch):
    opened = []

    class Taken(socket.socket):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            opened.append(self)

        def bind(self, address):
            raise OSError(errno.EADDRINUSE, "in use")

    monkeypatch.setattr("socket.socket", Taken)
    with pytest.raises(OSError, match="Address already in use"):
        listen("127.0.0.1", 80)
    assert [made.fileno() for made in opened] == [-1]


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("runs/quickstart", "quickstart"),
        ("runs/quickstart/", "quickstart"),
        ("hf://owner/model", "model"),
        ("/x/weights.pt", "weights.pt"),
        ("/", "magma"),
    ],
)
def test_names_of_models(checkpoint, name):
    assert name_of(checkpoint) == name


def test_the_folder_that_one_is_in_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert (name_of("."), name_of("./deeper/.."), name_of("deeper")) == ("mine", "mine", "deeper")


def test_prefixes():
    assert [root_path_of(path) for path in ("", "/", "a", "/a/", "a/b")] == ["", "", "/a", "/a", "/a/b"]


def test_a_line_for_every_request():
    lines = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if scope["path"] == "/broken":
            raise ConnectionError
        await send({"type": "http.response.body", "body": b""})

    async def nothing(*_):
        pass

    log = RequestLog(app, lines.append)
    for path in ("/v1/models", "/\x1b[31m\n\x85" + "a" * 500, "/broken"):
        scope = {"type": "http", "method": "GET", "path": path, "client": ("10.0.0.1", 5)}
        try:
            asyncio.run(log(scope, nothing, nothing))
        except ConnectionError:
            assert path == "/broken"
    assert lines[0].split()[2:6] == ["10.0.0.1", "GET", "/v1/models", "200"]
    assert lines[1].isprintable()
    assert len(lines[1]) < 400
    assert lines[2].endswith("broken off")
    assert not lines[0].endswith("broken off")

"""Who is let in besides those that ``hostile.py`` shows kept out: clients, the server's own page, and named others."""

import pytest

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError
from magma_jax.serve.network.origin import check_content_type, check_origin

CLIENT = {"host": "127.0.0.1:8000"}
LINK = {**CLIENT, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def is_let_in(headers, method="POST", path="/v1/chat/completions", **changes):
    try:
        check_origin(method, path, headers, ServerConfig(**changes))
    except RequestError:
        return False
    return True


@pytest.mark.parametrize(
    "headers",
    [
        CLIENT,
        {},  # HTTP 1.0
        {"host": "localhost"},
        {"host": "LOCALHOST.:8000"},
        {"host": "app.localhost:8000"},
        {"host": "[::1]:8000"},
        {"host": "192.168.1.5:8000"},
        {**CLIENT, "origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"host": "192.168.1.5", "origin": "http://192.168.1.5"},
        {"host": "[::1]", "origin": "https://[::1]"},  # behind a proxy
        {**CLIENT, "sec-fetch-site": "none"},
    ],
)
def test_let_in(headers):
    assert is_let_in(headers)


def test_the_machine_goes_by_its_name(monkeypatch):
    monkeypatch.setattr("magma_jax.serve.network.origin.own_name", lambda: "gpu7")
    assert is_let_in({"host": "gpu7:8000"})
    assert not is_let_in({"host": "gpu8:8000"})


def test_further_names_and_pages():
    named = {"host": "lab.example:8000"}
    assert not is_let_in(named)
    assert is_let_in(named, hosts=("lab.example",))
    assert is_let_in(named, hosts=("*",))
    assert is_let_in({**named, "origin": "http://lab.example:8000"}, hosts=("lab.example",))
    # A proxy may call the server by its address.
    assert is_let_in({**CLIENT, "origin": "https://lab.example"}, hosts=("lab.example",))
    foreign = {**CLIENT, "origin": "https://app.example", "sec-fetch-site": "cross-site"}
    assert not is_let_in(foreign)
    assert not is_let_in(foreign, hosts=("*",))
    assert is_let_in(foreign, origins=("https://app.example",))
    assert is_let_in(foreign, origins=("*",))
    assert not is_let_in(foreign, origins=("https://other.example", "http://app.example"))


def test_a_link_opens_the_page_and_nothing_else():
    assert is_let_in(LINK, "GET", "/")
    assert not is_let_in(LINK, "POST", "/")
    assert not is_let_in(LINK, "GET", "/metrics")
    assert not is_let_in({**LINK, "sec-fetch-dest": "iframe"}, "GET", "/")
    assert not is_let_in({**LINK, "sec-fetch-mode": "no-cors"}, "GET", "/")
    assert not is_let_in({**LINK, "host": "evil.example"}, "GET", "/")


@pytest.mark.parametrize("given", ["application/json", "Application/JSON; charset=utf-8", " application/json ", None])
def test_json_by_its_names(given):
    check_content_type("POST", "/v1/chat/completions", {} if given is None else {"content-type": given})
    check_content_type("GET", "/", {"content-type": "text/plain"})

"""URLs: what is refused before a connection, at the connection, and while the body comes."""

import dataclasses
import ipaddress
import random
import socket
import socketserver
import threading
import time

import pytest

from magma_jax.serve.prompts.addresses import _IPV4_BLOCKS, _IPV6_BLOCKS, is_public
from magma_jax.serve.prompts.fetch import FetchError, FetchRules, fetch
from tests.serve.hostile import INSIDE, OUTSIDE

KINDS = ((ipaddress.IPv4Address, 32), (ipaddress.IPv6Address, 128))
RULES = FetchRules(domains=("images.example",), max_bytes=1000, timeout=0.5, redirects=3)


def outside(host, port):
    return [OUTSIDE]


@pytest.mark.parametrize("address", [*INSIDE.values(), "fe80::1%eth0"])
def test_addresses_inside_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2001:200::1", "2a00::5efe"])
def test_addresses_outside_are(address):
    assert is_public(address)


def test_what_the_standard_library_calls_inside_is_not_public():
    draw = random.Random(0)
    edges = [block[edge] for block in (*_IPV4_BLOCKS, *_IPV6_BLOCKS) for edge in (0, -1)]
    sampled = [kind(draw.getrandbits(bits)) for kind, bits in KINDS for _ in range(5000)]
    for address in [*edges, *(edge + 1 for edge in edges if int(edge) + 1 < 2**32), *sampled]:
        assert address.is_global or not is_public(str(address)), address
    assert not any(is_public(str(edge)) for edge in edges)
    assert sum(is_public(str(address)) for address in sampled) > 4000


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://images.example/x", "only http and https"),
        ("http:///x", "only http and https"),
        ("http://user:secret@images.example/x", "with a user name"),
        ("http://other.example/x", "not among the allowed domains"),
        ("http://evilimages.example/x", "not among the allowed domains"),
        ("http://images.example.evil.example/x", "not among the allowed domains"),
        ("http://127.0.0.1/x", "not among the allowed domains"),
        ("http://images.example:99999/x", "not a URL"),
        ("http://[::1/x", "not a URL"),
    ],
)
def test_urls_that_are_refused_unseen(url, says):
    def never(host, port):
        raise AssertionError("resolved")

    with pytest.raises(FetchError, match=says):
        fetch(url, dataclasses.replace(RULES, resolver=never))


def test_domains_are_compared_in_any_case():
    assert FetchRules(("Images.EXAMPLE.", ".b.example")).domains == ("images.example", "b.example")
    for wrong in ("https://a.example", "a.example:80", "*.example", "."):
        with pytest.raises(ValueError, match="is not a domain"):
            FetchRules((wrong,))


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:10.0.0.1"], []])
def test_a_name_that_leads_inside_is_not_connected_to(addresses):
    rules = dataclasses.replace(RULES, resolver=lambda host, port: addresses)
    with pytest.raises(FetchError, match=r"not public|has no address"):
        fetch("http://images.example/x", rules)


@pytest.fixture
def host():
    """A host that answers each request with the next of given bytes; slow ones are lists of pieces."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.server.asked.append(self.request.recv(65536).decode())
            answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
            try:
                for piece in answer if isinstance(answer, list) else [answer]:
                    self.request.sendall(piece)
                    if isinstance(answer, list):
                        time.sleep(0.1)
            except OSError:
                pass

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def answering(*answers, path="/x.png", **changes):
            server.answers = list(answers)

            def connect(address, timeout):
                assert address == (OUTSIDE, 80)
                return socket.create_connection(server.server_address, timeout=timeout)

            rules = {"resolver": outside, "connector": connect, **changes}
            return fetch(f"http://images.example{path}", dataclasses.replace(RULES, **rules))

        answering.asked = server.asked
        yield answering
        server.shutdown()
        thread.join()


def ok(body, *headers):
    return b"\r\n".join([b"HTTP/1.1 200 OK", *headers, b"Connection: close", b"", body])


def moved(location):
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def test_a_body_is_fetched_in_the_name_of_the_host(host):
    assert host(ok(b"picture")) == b"picture"
    assert host.asked[0].startswith("GET /x.png HTTP/1.1\r\nHost: images.example")
    assert host(ok(b"picture"), path="/x?a=1#part") == b"picture"
    assert host.asked[1].startswith("GET /x?a=1 HTTP/1.1")


def test_redirects_are_followed_and_checked(host):
    assert host(moved("/y.png"), ok(b"there")) == b"there"
    with pytest.raises(FetchError, match=r"127\.0\.0\.1 is not among the allowed domains"):
        host(moved("http://127.0.0.1/admin"))
    with pytest.raises(FetchError, match="only http and https"):
        host(moved("file:///etc/passwd"))


def test_an_endless_chain_of_redirects_ends(host):
    asked = len(host.asked)
    with pytest.raises(FetchError, match="more than 3 redirects"):
        host(moved("/again"))
    assert len(host.asked) - asked == 4


def test_a_name_that_changes_its_mind_between_two_hops_is_caught(host):
    answers = iter([[OUTSIDE], ["10.0.0.1"]])
    with pytest.raises(FetchError, match="not public"):
        host(moved("/again"), resolver=lambda name, port: next(answers))
    # One resolution a hop, and the connection is made to what it gave.
    assert next(answers, None) is None


def test_a_lookup_that_hangs_is_not_waited_for():
    free = threading.Event()
    rules = dataclasses.replace(RULES, timeout=0.05, resolver=lambda name, port: free.wait() and [])
    with pytest.raises(FetchError, match="took too long"):
        fetch("http://images.example/x", rules)
    free.set()


def test_lookups_that_hang_are_counted(monkeypatch):
    hanging = threading.BoundedSemaphore(1)
    hanging.acquire()
    monkeypatch.setattr("magma_jax.serve.prompts.fetch._LOOKUPS", hanging)
    with pytest.raises(FetchError, match="too many lookups"):
        fetch("http://images.example/x", RULES)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (ok(b"x" * 2000), "larger than the limit of 1000"),
        (ok(b"", b"Content-Length: 5000000"), "larger than the limit of 1000"),
        (ok(b"x" * 10, b"Content-Encoding: gzip"), "compressed body"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "answered 302"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
        (b"", "closed the connection early"),
        (ok(b"short", b"Content-Length: 500"), "closed the connection early"),
        ([ok(b"x")] + [b"x"] * 20, "took too long"),
        ([b"HTTP/1.1 200 OK\r\n"] + [b"X-A: b\r\n"] * 20, "took too long"),
    ],
    ids=["large", "declared", "gzip", "404", "no location", "ssh", "nothing", "short", "slow body", "slow headers"],
)
def test_hosts_that_misbehave(host, answer, says):
    started = time.monotonic()
    with pytest.raises(FetchError, match=says) as error:
        host(answer)
    assert time.monotonic() - started < 20  # they would go on for ever
    assert "\n" not in str(error.value)


def test_nobody_listening_is_one_line():
    def refused(address, timeout):
        raise ConnectionRefusedError("refused")

    with pytest.raises(FetchError, match="cannot connect"):
        fetch("http://images.example/x", dataclasses.replace(RULES, resolver=outside, connector=refused))

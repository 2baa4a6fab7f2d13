"""Downloads images by URL, with protection against server-side request forgery (SSRF).

Every hop is checked: scheme, domain, and the very address of the connection, so that neither a redirect nor a name that
resolves differently the second time leads into the internal network. Time and size are limited during the download.
"""

import contextlib
import dataclasses
import http.client
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urljoin, urlsplit

from magma_jax.serve.prompts.addresses import is_public

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 64 * 1024

# Maximum number of concurrent lookups; a hanging one cannot be stopped and occupies a thread.
_LOOKUPS = threading.BoundedSemaphore(32)

Resolver = Callable[[str, int], Sequence[str]]
Connector = Callable[..., socket.socket]


def resolve(host: str, port: int) -> list[str]:
    """Resolves a host name to all of its addresses."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class FetchError(ValueError):
    """Failed download, with a one-line reason."""


@dataclasses.dataclass(frozen=True)
class FetchRules:
    """Rules for downloads.

    Attributes:
        domains: allowed hosts with their subdomains, case-insensitive; no other host is contacted.
        max_bytes: limit on the body.
        timeout: seconds in total, lookups and redirects included.
        redirects: maximum number of redirects.
        resolver: replacement of ``resolve``, for tests.
        connector: replacement of ``socket.create_connection``, for tests.
    """

    domains: tuple[str, ...] = ()
    max_bytes: int = 10 * 2**20
    timeout: float = 5.0
    redirects: int = 3
    resolver: Resolver = resolve
    connector: Connector = socket.create_connection

    def __post_init__(self):
        for domain in self.domains:
            if not domain.strip(".") or any(mark in domain for mark in "/:@* "):
                raise ValueError(f"{domain!r} is not a domain; give the bare name of a host, such as example.org")
        object.__setattr__(self, "domains", tuple(domain.strip(".").lower() for domain in self.domains))


def fetch(url: str, rules: FetchRules) -> bytes:
    """Downloads a URL.

    Raises:
        FetchError: not allowed, missing, too large, too slow, or too many redirects.
    """
    deadline = time.monotonic() + rules.timeout
    for _ in range(rules.redirects + 1):
        host, port, address = _checked(url, rules, deadline)
        connection = _connect(url, host, port, address, rules, deadline)
        try:
            response, body = _get(connection, url, rules, deadline)
        finally:
            connection.close()
        if response.status in _REDIRECTS and (location := response.getheader("Location")):
            url = urljoin(url, location)
            continue
        if response.status != 200:
            raise FetchError(f"{_short(url)}: the host answered {response.status}")
        return body
    raise FetchError(f"{_short(url)}: more than {rules.redirects} redirects")


def _checked(url: str, rules: FetchRules, deadline: float) -> tuple[str, int, str]:
    """Checks a URL and returns host, port and the address to connect to."""
    if not (url.isascii() and url.isprintable()):
        raise FetchError("a URL has ASCII characters alone, and no control characters; write others as %XX")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise FetchError(f"{_short(url)}: not a URL ({error})") from None
    if parts.scheme not in ("http", "https") or not host:
        raise FetchError(f"{_short(url)}: only http and https URLs are fetched")
    if parts.username or parts.password:
        raise FetchError(f"{_short(url)}: URLs with a user name are not fetched")
    host = host.rstrip(".").lower()
    if not any(host == domain or host.endswith(f".{domain}") for domain in rules.domains):
        raise FetchError(f"{_short(url)}: {host} is not among the allowed domains")
    port = port or (443 if parts.scheme == "https" else 80)
    try:
        addresses = _look_up(rules.resolver, host, port, _left(deadline, url))
    except queue.Empty:
        raise _too_slow(url) from None
    except (OSError, UnicodeError) as error:
        raise FetchError(f"{_short(url)}: {host} cannot be resolved ({error})") from None
    if not addresses:
        raise FetchError(f"{_short(url)}: {host} has no address")
    if not all(is_public(address) for address in addresses):
        raise FetchError(f"{_short(url)}: {host} leads to an address that is not public")
    return host, port, addresses[0]


def _look_up(resolver: Resolver, host: str, port: int, seconds: float) -> list[str]:
    """Resolves a host name within ``seconds``; a hanging lookup is left in its thread.

    Raises:
        queue.Empty: timeout. OSError, UnicodeError: no such name, or too many lookups hang.
    """
    if not _LOOKUPS.acquire(blocking=False):
        raise OSError("too many lookups are under way")
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def look() -> None:
        try:
            answer.put(list(resolver(host, port)))
        except (OSError, UnicodeError) as error:
            answer.put(error)
        finally:
            _LOOKUPS.release()

    threading.Thread(target=look, name="lookup", daemon=True).start()
    found = answer.get(timeout=seconds)
    if isinstance(found, Exception):
        raise found
    return found


def _connect(
    url: str, host: str, port: int, address: str, rules: FetchRules, deadline: float
) -> http.client.HTTPConnection:
    """Connects to the checked address, with the host's name for HTTP and TLS."""
    try:
        raw = rules.connector((address, port), timeout=_left(deadline, url))
        if urlsplit(url).scheme == "https":
            raw = _with_tls(raw, host, _left(deadline, url))
    except TimeoutError:
        raise _too_slow(url) from None
    except OSError as error:
        raise FetchError(f"{_short(url)}: cannot connect ({error})") from None
    connection = http.client.HTTPConnection(host, port)
    connection.sock = raw
    return connection


def _with_tls(raw: socket.socket, host: str, seconds: float) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    wrapped = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
    # A socket's timeout applies to each wait, and a handshake has many.
    alarm = threading.Timer(seconds, _hang_up, [wrapped])
    alarm.start()
    try:
        wrapped.do_handshake()
    except BaseException:
        wrapped.close()
        raise
    finally:
        alarm.cancel()
    return wrapped


def _get(
    connection: http.client.HTTPConnection, url: str, rules: FetchRules, deadline: float
) -> tuple[http.client.HTTPResponse, bytes]:
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # Bounds the total time, since a host may send a byte a second forever.
    alarm = threading.Timer(_left(deadline, url), _hang_up, [connection.sock])
    alarm.start()
    stack = contextlib.ExitStack()
    stack.callback(alarm.cancel)
    try:
        connection.putrequest("GET", target, skip_accept_encoding=True)
        connection.putheader("Accept", "image/*")
        connection.putheader("Accept-Encoding", "identity")
        connection.putheader("User-Agent", "magma_jax")
        connection.endheaders()
        response = connection.getresponse()
        stack.callback(response.close)
        if response.status != 200:
            return response, b""
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise FetchError(f"{_short(url)}: the host sent a compressed body")
        declared = response.getheader("Content-Length", "0")
        if declared.isdigit() and int(declared) > rules.max_bytes:
            raise _too_large(url, rules)
        body = bytearray()
        while chunk := response.read1(_CHUNK):
            body += chunk
            if len(body) > rules.max_bytes:
                raise _too_large(url, rules)
        _left(deadline, url)  # a connection closed by the timer looks like a normal end
        if declared.isdigit() and len(body) < int(declared):
            raise FetchError(f"{_short(url)}: the host closed the connection early")
        return response, bytes(body)
    except FetchError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        _left(deadline, url)
        reason = " ".join(str(error).split())
        raise FetchError(
            f"{_short(url)}: the host closed the connection early or does not speak HTTP ({reason:.80})"
        ) from None
    finally:
        stack.close()


def _hang_up(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _left(deadline: float, url: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _too_slow(url)
    return left


def _too_slow(url: str) -> FetchError:
    return FetchError(f"{_short(url)}: took too long")


def _too_large(url: str, rules: FetchRules) -> FetchError:
    return FetchError(f"{_short(url)}: larger than the limit of {rules.max_bytes} bytes")


def _short(url: str) -> str:
    return url if len(url) <= 100 else f"{url[:97]}..."

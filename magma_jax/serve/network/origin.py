"""Keeps web pages of other sites from using a server that their visitor's browser can reach.

A page may send requests anywhere, and under a name of its own that suddenly leads to this machine (DNS rebinding) it
may read the answers too; a browser adds the password that it remembers. So the name that a request calls the server by
must be the server's, and a page that asks must come from the server itself.
"""

import functools
import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError

_PORTS = {"http": 80, "https": 443}
_JSON = "application/json"


def check_origin(method: str, path: str, headers: Mapping[str, str], config: ServerConfig) -> None:
    """Lets through what does not come from another site's page.

    Args:
        headers: names in lower case.

    Raises:
        RequestError: 403, with what to do if the page is one's own.
    """
    host = headers.get("host")
    # A client of HTTP 1.0 names none; a browser always does.
    if host is not None and not _is_own_name(_name(host), config):
        raise RequestError(
            f"this server is not called {host!r:.80}; if it should be, start it with --allow-host {_name(host)!r:.80}",
            403,
        )
    origin = headers.get("origin")
    if origin is not None:
        known = {origin, "*"} & {*config.origins} or _name_of(origin) in config.hosts
        if not (known or _is_same(origin, host)):
            raise RequestError(f"pages of {origin!r:.80} may not use this server", 403)
        return
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return
    # Following a link to the page is no use of the server.
    opens = (method, path, headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
    if opens != ("GET", "/", "navigate", "document"):
        raise RequestError("pages of other sites may not use this server", 403)


def check_content_type(method: str, headers: Mapping[str, str]) -> None:
    """Takes only what says that it is JSON, or says nothing: a page can send any other type without asking first.

    Raises:
        RequestError: 415.
    """
    given = headers.get("content-type", _JSON)
    if method == "POST" and given.partition(";")[0].strip().lower() != _JSON:
        raise RequestError(
            f"the content type is {given!r:.80}; send the header 'Content-Type: application/json' "
            "(curl: -H 'Content-Type: application/json')",
            415,
        )


def _is_own_name(name: str, config: ServerConfig) -> bool:
    """Whether a server may be called so: by an address, which no other site can point here, or by a name of its own."""
    if "*" in config.hosts or name in config.hosts:
        return True
    if name in ("localhost", own_name()) or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@functools.cache
def own_name() -> str:
    """What the machine calls itself."""
    return socket.gethostname().lower()


def _is_same(origin: str, host: str | None) -> bool:
    """Whether a page at ``origin`` came from ``host``; its scheme may be that of a proxy in front."""
    try:
        parts = urlsplit(origin)
        port = _PORTS[parts.scheme]
        asked = urlsplit(f"//{host}")
        return host is not None and (parts.hostname, parts.port or port) == (asked.hostname, asked.port or port)
    except (ValueError, KeyError):
        return False


def _name_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""

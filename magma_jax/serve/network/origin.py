"""Protects the server from web pages of other sites (CSRF and DNS rebinding).

A page can send requests to any address that its visitor's browser reaches, with the browser's stored password; with DNS
rebinding, where the page's own name resolves to this machine, it can also read the answers. So the Host header must be
a name of the server, and a requesting page must have the server's origin.
"""

import functools
import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError

_PORTS = {"http": 80, "https": 443}
_JSON, _FORM = "application/json", "multipart/form-data"
# Routes that take a form with files. Pages can send one without a CORS preflight, so ``check_origin`` alone keeps
# other sites' pages out: browsers add the Origin header to every form that is posted.
_WITH_FILES = frozenset({"/v1/images/edits"})


def check_origin(method: str, path: str, headers: Mapping[str, str], config: ServerConfig) -> None:
    """Rejects requests from pages of other sites.

    Args:
        headers: headers by lower-case name.

    Raises:
        RequestError: 403, with the option that allows the page.
    """
    host = headers.get("host")
    # HTTP/1.0 clients may send no Host; browsers always do.
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
    # Following a link to the page is allowed.
    opens = (method, path, headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
    if opens != ("GET", "/", "navigate", "document"):
        raise RequestError("pages of other sites may not use this server", 403)


def check_content_type(method: str, path: str, headers: Mapping[str, str]) -> None:
    """Accepts only JSON or no content type, since pages can send other types without a CORS preflight, or a form with
    files where one belongs.

    Raises:
        RequestError: 415.
    """
    given = headers.get("content-type", _JSON)
    kind = given.partition(";")[0].strip().lower()
    if method == "POST" and path in _WITH_FILES and kind != _FORM:
        raise RequestError(f"the content type is {given!r:.80}; send the image as {_FORM}, as OpenAI's clients do", 415)
    if method == "POST" and path not in _WITH_FILES and kind != _JSON:
        raise RequestError(
            f"the content type is {given!r:.80}; send the header 'Content-Type: application/json' "
            "(curl: -H 'Content-Type: application/json')",
            415,
        )


def _is_own_name(name: str, config: ServerConfig) -> bool:
    """Whether a Host is allowed: an IP address, which cannot be rebound, or a name of the server."""
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
    """Host name of the machine."""
    return socket.gethostname().lower()


def _is_same(origin: str, host: str | None) -> bool:
    """Whether ``origin`` is at ``host``; the scheme is ignored, since a proxy may terminate TLS."""
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
    """Lower-case host of a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""

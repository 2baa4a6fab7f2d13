"""Listening sockets, bound before the model is loaded, so that a port in use is found at once."""

import os
import socket


def listen(host: str, port: int) -> list[socket.socket]:
    """Listens on every address of ``host``; port 0 selects a free port.

    Raises:
        OSError: no such host, or the port cannot be bound.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"--host {host}: no address of this machine ({error.strerror})") from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            made = socket.socket(family, kind, protocol)
            sockets.append(made)
            # Allows a restart on the same port without waiting.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((address[0], port, *address[2:]))
            made.listen(2048)
            port = made.getsockname()[1]
    except OSError as error:
        for made in sockets:
            made.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"cannot listen on {host} port {port} ({reason}); choose another --port or --host") from None
    return sockets

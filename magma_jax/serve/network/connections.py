"""uvicorn's HTTP/1.1 protocol with timeouts against slow clients.

A silent socket, a request head sent a byte a minute, or an answer that is not read would otherwise hold memory and a
file descriptor for as long as the client likes.
"""

import dataclasses
import functools
import json
import os
import resource
import sys
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from magma_jax.serve.config import ServerConfig
from magma_jax.serve.errors import RequestError, error_body

# Limit on a request's line and headers.
_MAX_HEAD_BYTES = 64 * 1024
# Seconds that a connection stays open for another request.
KEEP_ALIVE = 10
# Number of body chunks of any size; with more chunks their average size has this minimum. Processing a chunk takes as
# long as a few kilobytes.
_FREE_PIECES, _PIECE_BYTES = 4_000, 64
# Connections accepted at once before they are counted, and descriptors for files and image downloads.
_BACKLOG, _OTHER_FILES = 128, 64
# Minimum idle seconds before a connection may be closed in favour of a new one.
_IDLE = 1.0


def settings(app: FastAPI, config: ServerConfig, **options: Any) -> uvicorn.Config:
    """uvicorn config of the application; ``options`` are uvicorn's, such as host and port."""
    number = room_for_connections(config.connections)
    if number < config.connections:
        print(f"at most {number} connections: the limit of open files is low (ulimit -n)", file=sys.stderr)
    bounds = Bounds(number, config.head_timeout, config.send_timeout, config.timeout + config.send_timeout)
    protocol: Any = functools.partial(BoundedProtocol, shared=_Shared(bounds))
    return uvicorn.Config(
        app,
        # Only h11 limits the size of headers.
        http=protocol,
        ws="none",
        backlog=_BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=config.grace,  # pyright: ignore[reportArgumentType]  # a float works too
        **{"log_level": "error", **options},
    )


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits on connections.

    Attributes:
        connections: maximum number; above it a new connection replaces the one that has been idle longest.
        head: seconds for a request head to arrive; for further requests, in addition to the keep-alive time.
        send: seconds for a client to read pending data.
        request: seconds from a request's head until its answer was read.
    """

    connections: int
    head: float
    send: float
    request: float


class _Shared:
    """Shared state of a server's connections; ``idle``: start of each connection's idle time, longest idle first."""

    def __init__(self, bounds: Bounds):
        self.bounds = bounds
        self.idle: dict[BoundedProtocol, float] = {}
        self.interval = min(1.0, bounds.head / 4, bounds.send / 4)


class _Connection(h11.Connection):
    """Refuses bodies in very many tiny chunks."""

    def __init__(self):
        super().__init__(h11.SERVER, _MAX_HEAD_BYTES)
        self._pieces = self._bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._pieces += 1
            self._bytes += len(event.data)
            if self._pieces > _FREE_PIECES + self._bytes // _PIECE_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many pieces")
        return event


class BoundedProtocol(H11Protocol):
    """Protocol of one connection."""

    def __init__(self, *arguments: Any, shared: _Shared, **options: Any):
        super().__init__(*arguments, **options)
        self.conn = _Connection()
        self._shared, self._bounds = shared, shared.bounds
        self._busy_since = self._paused_since = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._shared.idle[self] = self.loop.time()
        self._timer = self.loop.call_later(self._shared.interval, self._look)
        if len(self.connections) > self._bounds.connections and not self._make_room():
            self._refuse(503, "too many connections; try again later")

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._shared.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        self._shared.idle[self] = self.loop.time()
        self._busy_since = None
        super().on_response_complete()
        self._note()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused_since = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, f"this is not an HTTP/1.1 request, or its head has more than {_MAX_HEAD_BYTES} bytes")

    def _note(self) -> None:
        """Updates the idle state."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy and self._busy_since is None:
            self._busy_since = self.loop.time()
            self._shared.idle.pop(self, None)

    def _make_room(self) -> bool:
        """Closes the connection that has been idle longest, if it was idle for ``_IDLE`` seconds."""
        longest, since = next(iter(self._shared.idle.items()))
        if self.loop.time() - since < _IDLE:
            return False
        del self._shared.idle[longest]
        longest.transport.abort()
        return True

    def _refuse(self, status: int, why: str) -> None:
        """Sends an error response without the application and closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(RequestError(why, status))).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            headers.append((b"content-length", str(len(body)).encode()))
            if self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD":
                body = b""
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        if self.cycle is not None:  # keeps the application from answering too late
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _look(self) -> None:
        """Checks the timeouts, periodically."""
        self._timer = self.loop.call_later(self._shared.interval, self._look)
        idle_since = self._shared.idle.get(self)
        unread_since = idle_since if self.transport.get_write_buffer_size() else None
        head = self._bounds.head + (KEEP_ALIVE if self.cycle is not None else 0)
        if (
            self._is_over(self._paused_since, self._bounds.send)
            or self._is_over(unread_since, self._bounds.send)
            or self._is_over(self._busy_since, self._bounds.request)
        ):
            self.transport.abort()  # close() would wait for the client to read
        elif self._is_over(idle_since, head):
            self.transport.close()

    def _is_over(self, since: float | None, seconds: float) -> bool:
        return since is not None and self.loop.time() - since > seconds


def room_for_connections(wanted: int) -> int:
    """Raises the limit of open files as far as allowed; returns the number of connections that it permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else _OTHER_FILES
    others += _BACKLOG + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted + others:
        soft = wanted + others if hard == resource.RLIM_INFINITY else min(hard, wanted + others)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = wanted if soft == resource.RLIM_INFINITY else soft - others
    return max(1, min(wanted, room))

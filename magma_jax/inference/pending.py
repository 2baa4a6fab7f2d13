"""Accepted requests whose results arrive in pieces, from the thread of an engine or a queue."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from magma_jax.output import FailedError


class Piece(Protocol):
    """Part of a result; ``finish`` is why the request ended, on the last piece, and None on the others."""

    @property
    def finish(self) -> str | None: ...


AnyPiece = TypeVar("AnyPiece", bound=Piece)


class EngineError(FailedError):
    """A request that could not be accepted or finished; the message is one line for the caller."""


class UnfinishedError(EngineError):
    """A request that cannot be satisfied: an error of the request, not of the engine."""


class QueueFull(EngineError):
    """Too many requests are waiting; try again later."""


class Pending(Generic[AnyPiece]):
    """An accepted request; thread-safe. Iterate over it to stream its pieces.

    Attributes:
        cancelled: whether the caller has cancelled it.
    """

    def __init__(self):
        self.cancelled = False
        self._pieces: list[AnyPiece] = []
        self._error: EngineError | None = None
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], object]] = []

    def cancel(self) -> None:
        """Cancels the request; what works on it stops soon."""
        self.cancelled = True

    def on_progress(self, listener: Callable[[], object]) -> None:
        """Calls ``listener`` now, and from the engine's thread whenever there is progress."""
        with self._changed:
            self._listeners.append(listener)
        listener()

    def pieces(self, start: int = 0) -> list[AnyPiece]:
        """The pieces so far from index ``start`` on, without waiting.

        Raises:
            EngineError: the request failed.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            return self._pieces[start:]

    @property
    def finish(self) -> Any:
        """Why the request ended; None while it runs."""
        pieces = self.pieces()
        return pieces[-1].finish if pieces else None

    def __iter__(self) -> Iterator[AnyPiece]:
        seen, finish = 0, None
        while finish is None:
            for piece in self._wait_for_more(seen):
                seen, finish = seen + 1, piece.finish
                yield piece

    def put(self, piece: AnyPiece) -> None:
        """Appends a piece; called by the engine."""
        with self._changed:
            self._pieces.append(piece)
        self._tell()

    def fail(self, error: EngineError) -> None:
        """Ends the request with an error; called by the engine."""
        with self._changed:
            self._error = error
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def _wait_for_more(self, seen: int) -> list[AnyPiece]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._pieces) > seen or self._error is not None)
        return self.pieces(seen)

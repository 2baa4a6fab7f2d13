"""A limit on the time of one image, within a process that reads many.

``data.decoders`` kills what takes too long; here it is interrupted, which costs an image some microseconds and needs
no second process.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

from magma_jax.data.pillow_steps import too_long

# What an image of one's own may take. A photograph of 60 megapixels takes one or two.
OWN_SECONDS = 10.0

# Until the next look, where Pillow's code was not what the alarm met.
AGAIN = 0.001

# Of the main thread's clock; None while there is no limit.
_end: float | None = None


class TimeLimit:
    """Limits the processor time of a ``with`` block in the main thread; other threads have no limit.

    Python handles signals in the main thread, between two calls of a C library; here only Pillow's code is interrupted.
    What one call does with an image is bounded by its size.

    Args:
        name: of the image, for the message.
        seconds: of processor time.

    Raises:
        ImageError: it took longer.
    """

    def __init__(self, name: str, seconds: float = OWN_SECONDS):
        self._name, self._seconds = name, seconds
        self._applies = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        global _end
        if self._applies:
            # For good: a late signal would end the process that has no handler.
            if signal.getsignal(signal.SIGPROF) is not _look:
                signal.signal(signal.SIGPROF, _look)
            _end = time.thread_time() + self._seconds
            signal.setitimer(signal.ITIMER_PROF, self._seconds)

    def __exit__(self, kind: type | None, *_: Any) -> None:
        global _end
        if self._applies:
            _end = None
            signal.setitimer(signal.ITIMER_PROF, 0)
        if kind is _TimeIsUp:
            raise too_long(self._name, self._seconds) from None


class _TimeIsUp(BaseException):
    """Of no kind that Pillow would take for damage."""


def _look(_: int, frame: FrameType | None) -> None:
    if _end is None:
        return
    # The alarm counts all threads of the process.
    left = _end - time.thread_time()
    # Anywhere else, as in a callback of the garbage collector, the exception could be lost.
    if left <= 0 and frame is not None and frame.f_globals.get("__name__", "").startswith("PIL."):
        raise _TimeIsUp
    signal.setitimer(signal.ITIMER_PROF, max(left, AGAIN))

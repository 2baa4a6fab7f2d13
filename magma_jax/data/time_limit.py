"""CPU time limit for decoding one image in this process.

``data.decoders`` kills slow decodes in another process; this limit interrupts them, which costs a few microseconds per
image and needs no second process.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

from magma_jax.data.pillow_steps import too_long

# Limit for trusted images, in seconds. A photograph of 60 megapixels takes one or two.
OWN_SECONDS = 10.0

# Seconds until the next check if the signal arrived outside Pillow's code.
AGAIN = 0.001

# End of the limit on the main thread's CPU clock; None without a limit.
_end: float | None = None


class TimeLimit:
    """Limits the CPU time of a ``with`` block in the main thread; no effect in other threads.

    Python handles signals in the main thread, between calls of C libraries; only Pillow's code is interrupted. The
    image size bounds the time of a single call.

    Args:
        name: name of the image, for the message.
        seconds: CPU time.

    Raises:
        ImageError: the limit was exceeded.
    """

    def __init__(self, name: str, seconds: float = OWN_SECONDS):
        self._name, self._seconds = name, seconds
        self._applies = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        global _end
        if self._applies:
            # Never removed: without a handler a late signal would end the process.
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
    """Interrupts decoding; a BaseException, since Pillow treats Exceptions as damaged images."""


def _look(_: int, frame: FrameType | None) -> None:
    if _end is None:
        return
    # The timer counts all threads of the process.
    left = _end - time.thread_time()
    # Elsewhere, such as in a garbage collector callback, the exception could be lost.
    if left <= 0 and frame is not None and frame.f_globals.get("__name__", "").startswith("PIL."):
        raise _TimeIsUp
    signal.setitimer(signal.ITIMER_PROF, max(left, AGAIN))

"""Counts compilations: one after a server's warm-up delays a request.

Reads from the persistent cache count too: they are faster, but delay a request as well.
"""

import functools

import jax

from magma_jax.runtime.compile import CACHE_EVENT, COMPILATION_EVENT


class Compilations:
    """Programs that were compiled or read from the persistent cache.

    Attributes:
        count: number of programs.
        cached: number of those read from the persistent cache.
        seconds: total time.
    """

    def __init__(self):
        self.count, self.cached, self.seconds = 0, 0, 0.0

    def __call__(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event == COMPILATION_EVENT:
            self.count += 1
            self.seconds += duration_secs
        elif event == CACHE_EVENT:
            self.cached += 1


@functools.cache
def compilations_of_process() -> Compilations:
    """Counter of this process, which starts with the first call."""
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    return counter

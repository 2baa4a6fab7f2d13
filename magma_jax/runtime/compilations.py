"""Counts the programs that are made ready: a server that does so after its warm-up makes somebody wait.

A program is compiled, or read from the persistent cache, which is quicker but no less late.
"""

import functools

import jax

from magma_jax.runtime.compile import CACHE_EVENT, COMPILATION_EVENT


class Compilations:
    """Programs made ready.

    Attributes:
        count: how many.
        cached: of these, how many were read from the persistent cache.
        seconds: that all took.
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
    """Counts from the first call on."""
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    return counter

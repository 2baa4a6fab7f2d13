"""Counts what XLA compiles: a server that compiles after its warm-up makes somebody wait."""

import contextlib
import functools
from collections.abc import Iterator

import jax

from magma_jax.compile import COMPILATION_EVENT


class Compilations:
    """How many programs were compiled, and for how many seconds."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0

    def __call__(self, event: str, duration: float, **details: object) -> None:
        if event == COMPILATION_EVENT:
            self.count += 1
            self.seconds += duration


@functools.cache
def compilations_of_process() -> Compilations:
    """Counts from the first call on."""
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    return counter


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Counts while the block runs, in all threads."""
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    try:
        yield counter
    finally:
        jax.monitoring.unregister_event_duration_listener(counter)

"""Counts what a test compiles."""

import contextlib

import jax

from magma_jax.runtime.compilations import Compilations


@contextlib.contextmanager
def count_compilations():
    """Counts while the block runs, in all threads."""
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    try:
        yield counter
    finally:
        jax.monitoring.unregister_event_duration_listener(counter)

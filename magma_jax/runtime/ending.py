"""How a process ends, and what it gives back to the system, also where it ends without its exit handlers."""

import os
import sys
import weakref
from collections.abc import Callable
from typing import NoReturn

_registered: list[weakref.finalize] = []
_abandoned = False


def give_back_at_end(owner: object, give_back: Callable[..., object], *arguments: object, **options: object) -> None:
    """Calls ``give_back`` once: when ``owner`` is no longer used, the process exits, or ``give_back_all`` is called.

    Args:
        owner: must not be reachable from the other arguments.
    """
    _registered[:] = [one for one in _registered if one.alive]
    _registered.append(weakref.finalize(owner, give_back, *arguments, **options))


def give_back_all() -> None:
    """Gives back everything at once; to be called before ``os._exit``, which runs no exit handlers."""
    for one in _registered:
        one()


def abandon_threads() -> None:
    """Makes ``end_process`` end at once, without the threads of a library that go on with what has failed already."""
    global _abandoned
    _abandoned = True


def end_process(status: int) -> NoReturn:
    """Ends the process with an exit status, as ``sys.exit`` does; see ``abandon_threads``."""
    if _abandoned:
        give_back_all()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

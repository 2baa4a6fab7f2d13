"""What a process gives back to the system when it ends, also where it ends without its exit handlers."""

import weakref
from collections.abc import Callable

_registered: list[weakref.finalize] = []


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

"""``jax.jit`` for programs that hold a large model's weights in half precision."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# The CPU computes in fp32. Its compiler would widen the weights of all layers before the loop over them, which takes
# three times the memory of a model in half precision; without this pass it widens one layer at a time.
_CPU_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class _Jitted:
    """A jitted function whose options depend on the devices, which are not touched before the first call."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._function, self._options = function, options

    @functools.cached_property
    def _jitted(self) -> Any:
        compiler = _CPU_OPTIONS if jax.default_backend() == "cpu" else None
        return jax.jit(self._function, compiler_options=compiler, **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._jitted, name)


def jit(**options: Any) -> Callable[[Callable[..., Any]], _Jitted]:
    """A decorator: ``jax.jit`` with its ``options``, which widens weights of half precision one layer at a time."""
    return lambda function: _Jitted(function, options)

"""XLA compiler options, the compilation cache, and memory that compilation leaves allocated."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# JAX's events: every program that is compiled or read from the persistent cache; every cache read.
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_EVENT = "/jax/compilation_cache/cache_retrieval_time_sec"

_OPTIONS = {
    # The CPU computes in fp32. This pass hoists the conversion of half-precision weights out of the layer loop, which
    # takes three times the model's memory; without it one layer is converted at a time.
    "cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
    # Disables the windowed einsum, a loop over the shards of a gathered weight. All-gathers of whole weights overlap
    # with the preceding matmuls just as well, and the program compiles faster.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}


def enable_compilation_cache(wanted: bool = True) -> None:
    """Enables JAX's persistent compilation cache; disables it if not ``wanted``.

    The folder is ``JAX_COMPILATION_CACHE_DIR``, or ``magma_jax/programs`` in the user's cache folder if that is
    writable; it may be removed at any time.
    """
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    # JAX defines its options at run time.
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magma_jax" / "programs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # runs without a cache if the home folder is not writable
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX's default skips programs that compile within a second, which is all of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def compiler_options(platform: str) -> dict[str, str]:
    """Compiler options of a platform (``cpu``, ``gpu`` or ``tpu``)."""
    return dict(_OPTIONS.get(platform, {}))


@functools.cache
def trim_after_compile() -> None:
    """Returns memory to the system after every compilation from now on.

    glibc would keep it: 1 GB for the step of a mid-size model on a CPU, on top of what the step needs. No effect with
    other C libraries.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return

    def after_compilation(event: str, duration_secs: float, **details: str | int) -> None:
        # Shorter compilations leave little memory, and tests compile a thousand small programs.
        if event == COMPILATION_EVENT and duration_secs > 1:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(after_compilation)


class _Jitted:
    """Jitted function whose options depend on the platform, which is not initialised before the first call."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._function, self._options = function, options

    @functools.cached_property
    def _jitted(self) -> Any:
        return jax.jit(self._function, compiler_options=compiler_options(jax.default_backend()), **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._jitted, name)


def platform_jit(**options: Any) -> Callable[[Callable[..., Any]], _Jitted]:
    """Decorator: ``jax.jit`` with ``options`` and the compiler options of the default platform."""
    return lambda function: _Jitted(function, options)

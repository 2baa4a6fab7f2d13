"""What is asked of XLA's compilers: their options, and the memory they leave behind."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# Recorded by JAX once for every program that is compiled or read from the persistent cache, and for the latter alone.
COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_EVENT = "/jax/compilation_cache/cache_retrieval_time_sec"

_OPTIONS = {
    # The CPU computes in fp32. Its compiler would widen the weights of all layers before the loop over them, which
    # takes three times the memory of a model in half precision; without this pass it widens one layer at a time.
    "cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
    # XLA would turn a matmul with a gathered weight into a loop over its pieces. Gathers of whole weights run beside
    # the matmuls before them just as well, and the program compiles faster.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}


def enable_compilation_cache(wanted: bool = True) -> None:
    """From now on compiled programs are kept in a folder, and the next process reads them instead of compiling.

    The folder is ``JAX_COMPILATION_CACHE_DIR``, or ``magma_jax/programs`` in the user's cache folder if that can be
    written; it may be removed at any time. Not ``wanted``: nothing is kept or read.
    """
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    # JAX adds its options at run time.
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magma_jax" / "programs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that cannot be written is no reason not to run
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX leaves out what compiles within a second; a small model has nothing else.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def compiler_options(platform: str) -> dict[str, str]:
    """What the compiler of a platform (``cpu``, ``gpu``, ``tpu``) does better otherwise."""
    return dict(_OPTIONS.get(platform, {}))


@functools.cache
def trim_after_compile() -> None:
    """From now on memory that a compilation used goes back to the system as it ends.

    The C library would keep it for the process: 1 GB for the step of a mid-size model on a CPU, on top of what the
    step needs. Only glibc can be told; elsewhere nothing changes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return

    def after_compilation(event: str, duration_secs: float, **details: str | int) -> None:
        # What compiles in less time leaves little, and tests compile a thousand small programs.
        if event == COMPILATION_EVENT and duration_secs > 1:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(after_compilation)


class _Jitted:
    """A jitted function whose options depend on the devices, which are not touched before the first call."""

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
    """A decorator: ``jax.jit`` with its ``options`` and those of the default platform's compiler."""
    return lambda function: _Jitted(function, options)

"""Several processes as one run: they start together, speak with one voice and end together.

Every process runs the same program on its own devices. JAX finds the others by itself on TPU pods, under SLURM, Open
MPI and Kubernetes; elsewhere three environment variables say where they are:

    JAX_COORDINATOR_ADDRESS    host:port of process 0, reachable from all
    JAX_NUM_PROCESSES          how many processes there are
    JAX_PROCESS_ID             which of them this one is: 0, 1, ...

A process that fails takes the others down with it, since no step can be done without its devices.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed  # the coordination service has no public interface
from jax.experimental import multihost_utils
from tqdm import tqdm

from magma_jax.config import ConfigError
from magma_jax.output import printable

# A process that has been silent for so long is taken for dead, and the others abort.
HEARTBEAT_TIMEOUT_S = 30
# Ends and failures that all processes meet at about the same time.
SHUTDOWN_TIMEOUT_S = 60
COORDINATOR_GRACE_S = 2
# Nobody waits that long for a process that is dead: see the heartbeat.
BARRIER_TIMEOUT_S = 12 * 3600

RESTART = "start all processes again, and the run continues from its newest checkpoint"

_barriers = itertools.count()

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is the one that prints and writes; with a single process it always is."""
    return jax.process_index() == 0


def log_main(message: str) -> None:
    """One line for whoever watches the run, once for all processes, and above the progress bar if there is one."""
    if is_main():
        tqdm.write(printable(message), file=sys.stderr)


def barrier(name: str) -> None:
    """Waits until every process has come here; one may take hours longer than the others, writing weights."""
    if jax.process_count() > 1:
        # JAX's public barrier is a collective, and those give up after 30 seconds on CPUs. Every barrier has a name
        # of its own, also if it is passed twice.
        name = f"magma_jax/{name}/{next(_barriers)}"
        client = distributed.global_state.client
        assert client is not None  # there are several processes, so it was started
        client.wait_at_barrier(name, timeout_in_ms=BARRIER_TIMEOUT_S * 1000)


def broadcast_from_main(answer: bool) -> bool:
    """The first process's answer, for all: what several processes see of a shared disk may differ for a moment."""
    barrier("question")
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def json_from_main(ask: Callable[[], T]) -> T:
    """The first process's answer, plain JSON values, for all: they must agree, and may see a disk differently."""
    if jax.process_count() == 1:
        return ask()
    text = json.dumps(ask()).encode() if is_main() else b""
    # Reading a large checkpoint takes longer than a collective waits.
    barrier("checkpoint")
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
    buffer = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


@contextlib.contextmanager
def distributed_run(wanted: bool = True) -> Iterator[None]:
    """Runs its block as one of several processes; with ``wanted=False`` as the only one.

    To be entered before anything uses a device. If the block raises, this process says so in one line and exits with
    status 1 at once, without waiting for the others; a process that is killed, or that JAX aborts because another is
    gone, leaves a line too.

    Raises:
        ConfigError: the other processes cannot be found.
    """
    if not wanted:
        yield
        if jax.process_count() > 1:
            raise ConfigError("these devices belong to several processes: start each of them with --distributed")
        return
    _initialize()
    name = f"process {jax.process_index()} of {jax.process_count()}"
    with _last_words(f"{name} was killed, or aborted because another process is gone: {RESTART}"):
        try:
            yield
            jax.distributed.shutdown()
        except (SystemExit, Exception) as error:
            if isinstance(error, SystemExit) and not error.code:
                jax.distributed.shutdown()
                raise
            _report(name, error)
        else:
            return
    if is_main():
        # The others abort as soon as process 0 is gone; they may have met the same error and want to say so.
        time.sleep(COORDINATOR_GRACE_S)
    # No orderly exit: it would wait for processes that are waiting for this one.
    os._exit(1)


def _initialize() -> None:
    numbers = {}
    for variable in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        value = os.environ.get(variable)
        if value is not None and not value.isdigit():
            raise ConfigError(f"{variable}: expected a number, got {value!r}")
        numbers[variable] = None if value is None else int(value)
    try:
        jax.distributed.initialize(
            num_processes=numbers["JAX_NUM_PROCESSES"],
            process_id=numbers["JAX_PROCESS_ID"],
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"cannot join the other processes ({reason:.200}); where JAX does not find them by itself, set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def _report(name: str, error: BaseException) -> None:
    expected = (ValueError, OSError, FloatingPointError, SystemExit, jax.errors.JaxRuntimeError)
    if not isinstance(error, expected):
        traceback.print_exception(error)
    reason = printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
    remedy = f"; if another process stopped first, its output says why; {RESTART}"
    print(
        f"{name}: {reason}{remedy if isinstance(error, jax.errors.JaxRuntimeError) else ''}",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _last_words(message: str) -> Iterator[None]:
    """Prints ``message`` if this process dies within the block in a way that Python does not see.

    JAX aborts in C++, and nothing runs in a process that is killed; so a shell waits at the other end of a pipe.
    """
    witness = subprocess.Popen(
        ["sh", "-c", 'read -r ended || echo "$0" >&2', message],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process alone
    )
    try:
        yield
    finally:
        witness.communicate(b"ended\n")

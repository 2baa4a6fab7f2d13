"""Multi-process runs: initialisation, barriers, broadcasts, and a common end.

Every process runs the same program on its own devices. JAX discovers the others on TPU pods, under SLURM, Open MPI and
Kubernetes; elsewhere three environment variables are needed:

    JAX_COORDINATOR_ADDRESS    host:port of process 0, reachable from all
    JAX_NUM_PROCESSES          number of processes
    JAX_PROCESS_ID             index of this process: 0, 1, ...

A process that fails ends the others too, since no step can run without its devices.
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

from magma_jax.commands import ERRORS, status_of
from magma_jax.config import ConfigError
from magma_jax.output import printable
from magma_jax.runtime.ending import give_back_all

# A process without a heartbeat for this long counts as dead, and the others abort.
HEARTBEAT_TIMEOUT_S = 30
# Waits for ends and failures that reach all processes at about the same time.
SHUTDOWN_TIMEOUT_S = 60
COORDINATOR_GRACE_S = 2
# Long enough to write weights; a dead process is detected earlier, by its heartbeat.
BARRIER_TIMEOUT_S = 12 * 3600

RESTART = "start all processes again, and the run continues from its newest checkpoint"

_barriers = itertools.count()

T = TypeVar("T")


def is_main() -> bool:
    """Whether this is process 0, the one that prints and writes."""
    return jax.process_index() == 0


def log_main(message: str) -> None:
    """Prints one line from process 0, above the progress bar if there is one."""
    if is_main():
        tqdm.write(printable(message), file=sys.stderr)


def barrier(name: str) -> None:
    """Waits for all processes; one may take hours longer than the others to write weights."""
    if jax.process_count() > 1:
        # JAX's public barrier is a collective, which times out after 30 seconds on CPUs. Barrier names must be unique.
        name = f"magma_jax/{name}/{next(_barriers)}"
        client = distributed.global_state.client
        assert client is not None  # initialised, since there are several processes
        client.wait_at_barrier(name, timeout_in_ms=BARRIER_TIMEOUT_S * 1000)


def broadcast_from_main(answer: bool) -> bool:
    """Process 0's answer on all processes, whose views of a shared disk may briefly differ."""
    barrier("question")
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def json_from_main(ask: Callable[[], T]) -> T:
    """Process 0's answer, plain JSON values, on all processes, whose views of a disk may differ."""
    if jax.process_count() == 1:
        return ask()
    text = json.dumps(ask()).encode() if is_main() else b""
    # Reading a large checkpoint takes longer than the timeout of a collective.
    barrier("checkpoint")
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
    buffer = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


@contextlib.contextmanager
def distributed_run(wanted: bool = True) -> Iterator[None]:
    """Runs its block as one of several processes; with ``wanted=False`` as a single process.

    Must be entered before any use of a device. If the block raises, this process prints one line and exits at once,
    without waiting for the others, with the status that a single process has, see ``commands``. A process that is
    killed, or that JAX aborts because another one ended, leaves a line too.

    Raises:
        ConfigError: the other processes cannot be reached.
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
            status = status_of(error)
        else:
            return
    if is_main():
        # The others abort as soon as process 0 ends; this leaves them time to report the same error.
        time.sleep(COORDINATOR_GRACE_S)
    give_back_all()
    # A regular exit would wait for processes that wait for this one.
    os._exit(status)


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
    if not isinstance(error, (*ERRORS, SystemExit, jax.errors.JaxRuntimeError)):
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
    """Prints ``message`` if this process dies within the block without a Python exception.

    JAX aborts in C++, and a killed process runs no handler, so a shell at the other end of a pipe prints it.
    """
    witness = subprocess.Popen(
        ["sh", "-c", 'read -r ended || echo "$0" >&2', message],
        stdin=subprocess.PIPE,
        start_new_session=True,  # keeps Ctrl-C from the shell
    )
    try:
        yield
    finally:
        witness.communicate(b"ended\n")

"""Time to save and resume a checkpoint in a bucket, beside a local disk.

    python benchmarks/bucket.py                            a server on this machine that keeps objects in memory
    python benchmarks/bucket.py --address gs://BUCKET/benchmark --megabytes 2000

Prints the seconds until training goes on (the copy to the host), until the step is whole, and of resuming from it:
the median of --repeats saves. A server on this machine costs its processor and no network, so its figures say what the
library adds, not what a bucket takes.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from magma_jax.storage.objects.copies import WorkingCopy
from magma_jax.training.checkpoints.bucket_checkpoints import BucketCheckpoints
from magma_jax.training.checkpoints.checkpoint import RunCheckpoints, Snapshot
from magma_jax.training.step.train_step import TrainState
from tests.storage.gcs_server import bucket_server


def main() -> None:
    """Measures both places and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="folder in a bucket; default: a server on this machine")
    parser.add_argument("--megabytes", type=int, default=240, help="size of the state; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    arguments = parser.parse_args()
    server = None
    if arguments.address is None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        server = multiprocessing.get_context("spawn").Process(target=_serve, args=(sender,), daemon=True)
        server.start()
        os.environ.update(receiver.recv())
    address = arguments.address or f"gs://bucket/benchmark-{os.getpid()}"
    print(f"{arguments.megabytes} MB in arrays of 8 MB, median of {arguments.repeats} saves")
    with tempfile.TemporaryDirectory() as folder:
        places: dict[str, Callable[[], Any]] = {
            "local disk": lambda: RunCheckpoints(Path(folder) / "run", writing=True),
            address: lambda: BucketCheckpoints(WorkingCopy(address, Path(folder) / "copy")),
        }
        for name, place in places.items():
            go_on, whole, resume = _measure(place, arguments.megabytes, arguments.repeats)
            print(f"{name:<28}goes on after {go_on:6.2f} s   whole after {whole:6.2f} s   resumed in {resume:6.2f} s")
    if server is not None:
        server.terminate()


def _serve(sender: Any) -> None:
    sender.send(bucket_server().environment)
    time.sleep(10**6)


def _snapshot(step: int, megabytes: int) -> Snapshot:
    """A state as Adam's: two moments for each array of parameters."""
    arrays = {f"layer_{i}": jnp.full((1024, 2048), step + i, jnp.float32) for i in range(megabytes // 24)}
    moments = {name: (array + 0.1, array + 0.2) for name, array in arrays.items()}
    return Snapshot(TrainState(jnp.int32(step), arrays, {}, moments), jax.random.key(0), {})


def _measure(place: Callable[[], Any], megabytes: int, repeats: int) -> tuple[float, float, float]:
    going, whole = [], []
    with place() as checkpoints:
        for step in range(1, repeats + 1):
            snapshot = jax.block_until_ready(_snapshot(step, megabytes))
            begun = time.perf_counter()
            checkpoints.save(snapshot)
            going.append(time.perf_counter() - begun)
            checkpoints._finish_save()
            whole.append(time.perf_counter() - begun)
    empty = _snapshot(0, megabytes)
    with place() as checkpoints:
        begun = time.perf_counter()
        restored = checkpoints.restore(empty.state, empty.key)
        jax.block_until_ready(restored.state)
        resumed = time.perf_counter() - begun
    assert int(restored.state.step) == repeats
    return statistics.median(going), statistics.median(whole), resumed


if __name__ == "__main__":
    main()

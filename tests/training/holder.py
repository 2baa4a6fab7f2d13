"""A process that writes a run folder until it is killed: ``python -m tests.training.holder WORKDIR``.

Says ``held`` on standard output when it has the folder, and ends when its standard input does.
"""

import sys
from pathlib import Path

from magma_jax.training.checkpoints.run_lock import RunLock


def main(workdir: str) -> None:
    lock = RunLock(Path(workdir))
    print("held", flush=True)
    sys.stdin.read()
    lock.release()


if __name__ == "__main__":
    main(*sys.argv[1:])

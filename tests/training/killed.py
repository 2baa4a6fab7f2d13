"""A run of four steps that stops its own process: ``python -m tests.training.killed WORKDIR WHEN``.

WHEN is ``asked``: by SIGTERM in step 2; or killed ``between``: after step 3, behind the checkpoint of step 2; or
killed while ``saving``: when the arrays of step 3's checkpoint are on disk, and it has not got its name yet.
"""

import os
import signal
import sys
from pathlib import Path

from magma_jax.training.checkpoints import checkpoint
from magma_jax.training.milestones import Milestones
from magma_jax.training.run import setup
from tests import tiny


def main(workdir: str, when: str) -> None:
    setup.load_dataset = lambda config: tiny.dataset()
    if when == "between":
        after = Milestones.after

        def kill_after_step_3(self: Milestones, step: int) -> bool:
            while step == 3 and not (Path(workdir) / "checkpoints" / "2").is_dir():
                pass  # the save of step 2 is under way
            return _kill() if step == 3 else after(self, step)

        Milestones.after = kill_after_step_3
        tiny.train(tiny.run_config(checkpoint_every=2), workdir)
    elif when == "asked":
        after = Milestones.after

        def ask_in_step_2(self: Milestones, step: int) -> bool:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return after(self, step)

        Milestones.after = ask_in_step_2
        tiny.train(tiny.run_config(checkpoint_every=4), workdir)
    else:
        write = checkpoint.write_checksums
        checkpoint.write_checksums = lambda folder, leave_out: (
            _kill() if folder.name.startswith("3.") else write(folder, leave_out)
        )
        tiny.train(tiny.run_config(), workdir)


def _kill() -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])

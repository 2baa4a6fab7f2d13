"""Which samples a run could not use: counted in its figures, and listed in its folder."""

from pathlib import Path
from typing import Any

import jax

from magma_jax.training.monitor.writers import append_line, cut_after

SKIPPED_FILE = "skipped"


class SkippedSamples:
    """Follows an iterator of batches, see ``data.batches.folders.FolderIterator``; others leave out nothing.

    ``skipped.jsonl`` in the run folder has a line for every sample that was left out: ``step``, ``folder``, ``row``
    and ``reason``. Every process knows of its own rows, and lists them in ``skipped-1.jsonl`` and so on.

    Args:
        batches: the iterator.
        workdir: the run folder.
        step: steps that are done; what the file has of later ones, from before a crash, is removed.
    """

    def __init__(self, batches: Any, workdir: Path, step: int):
        self._batches = batches
        number = jax.process_index()
        self._file = workdir / f"{SKIPPED_FILE}{f'-{number}' if number else ''}.jsonl"
        cut_after(self._file, step)

    def record(self, step: int) -> None:
        """Lists what was left out of the batch of ``step``, which the iterator has just returned."""
        for entry in getattr(self._batches, "just_skipped", ()):
            append_line(self._file, {"step": step, **entry})

    def counts(self) -> dict[str, int]:
        """``skipped_samples`` of this process since the run began; empty for batches that leave out nothing."""
        skipped = getattr(self._batches, "skipped", None)
        return {} if skipped is None else {"skipped_samples": skipped}

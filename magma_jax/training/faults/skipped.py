"""Skipped samples of a run: counted in its metrics and listed in its folder."""

from pathlib import Path
from typing import Any

import jax

from magma_jax.training.monitor.writers import append_line, cut_after

SKIPPED_FILE = "skipped"


class SkippedSamples:
    """Records the samples that ``data.batches.folders.FolderIterator`` skips; other iterators skip none.

    ``skipped.jsonl`` in the run folder has one line per skipped sample: ``step``, ``folder``, ``row`` and ``reason``.
    Every further process lists its own rows in ``skipped-1.jsonl`` and so on.

    Args:
        batches: the iterator.
        workdir: the run folder.
        step: number of finished steps; lines of later ones, from before a crash, are removed.
    """

    def __init__(self, batches: Any, workdir: Path, step: int):
        self._batches = batches
        number = jax.process_index()
        self._file = workdir / f"{SKIPPED_FILE}{f'-{number}' if number else ''}.jsonl"
        cut_after(self._file, step)

    def record(self, step: int) -> None:
        """Lists the samples skipped in the batch of ``step``, which the iterator has just returned."""
        for entry in getattr(self._batches, "just_skipped", ()):
            append_line(self._file, {"step": step, **entry})

    def counts(self) -> dict[str, int]:
        """``skipped_samples`` of this process since the run began; empty for iterators that never skip."""
        skipped = getattr(self._batches, "skipped", None)
        return {} if skipped is None else {"skipped_samples": skipped}

"""Throughput of a run: samples, tokens and operations per second since the last report."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np


@dataclasses.dataclass
class Window:
    """Totals of the steps since the last report.

    Attributes:
        steps: optimizer steps.
        samples: samples in their batches, over all processes.
        tokens: tokens of these samples, without padding and image positions.
        flops: operations, see ``training.step.flops``.
        waited: seconds in which the loop waited for batches.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: int = 0
    waited: float = 0.0


class Meter:
    """Sums up steps and measures the time spent training, on ``clock`` (seconds).

    Time inside ``paused`` is excluded: checkpoints, evaluation and compilation. Steps run asynchronously, so the caller
    must make sure that the device has finished before it pauses or reads figures.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._started = self._mark = clock()
        self._window = Window()
        self._last_wait = 0.0
        self.paused_seconds = 0.0
        self.total = Window()

    @property
    def elapsed(self) -> float:
        """Seconds since the start, pauses included."""
        return self._clock() - self._started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which the loop waits for a batch."""
        before = self._clock()
        yield
        self._last_wait = self._clock() - before
        self._window.waited += self._last_wait

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time is not training time."""
        before = self._clock()
        yield
        passed = self._clock() - before
        self._mark += passed
        self.paused_seconds += passed

    def skip(self, seconds: float | int) -> None:
        """Excludes a step that took ``seconds`` and has just finished, and the wait for its batch."""
        if self._window.steps:
            self._window.waited -= self._last_wait
            self._mark += seconds + self._last_wait
        else:
            self._window = Window()
            self._mark = self._clock()

    def count(self, samples: int, tokens: int, flops: int) -> None:
        """Adds one step."""
        for window in (self._window, self.total):
            window.steps += 1
            window.samples += samples
            window.tokens += tokens
            window.flops += flops

    def cut(self) -> Window:
        """Ends the window at the last counted step and begins the next; ``figures`` sets the window's end time."""
        window, self._window = self._window, Window()
        return window

    def figures(self, window: Window, peak: float | int | None) -> dict[str, float]:
        """Speed in a window whose last step has just finished; empty for a window without steps.

        ``peak`` is the peak FLOP/s of all devices together, if known.
        """
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        if not window.steps or seconds <= 0:
            return {}
        figures = {
            "samples_per_second": window.samples / seconds,
            "tokens_per_second": window.tokens / seconds,
            "step_seconds": seconds / window.steps,
            "input_wait": min(window.waited / seconds, 1.0),
            "model_flops_per_second": window.flops / seconds,
        }
        return figures if peak is None else figures | {"mfu": figures["model_flops_per_second"] / peak}


def count_batch(batch: Mapping[str, np.ndarray], pad_id: int) -> tuple[int, int]:
    """Numbers of samples and of non-padding tokens in a batch; see ``data.batches.batching`` for batches.

    Unpacked rows are padded with ``pad_id``, which is also the end of text: the first of those at the end of a row
    counts.
    """
    tokens = batch["tokens"]
    if "segments" in batch:
        return int(batch["segments"].max(axis=1).sum()), int((batch["segments"] > 0).sum())
    rows, length = tokens.shape
    is_text = tokens != pad_id
    # One end of text follows the last text token, unless the row is full.
    last = np.where(is_text.any(axis=1), length - is_text[:, ::-1].argmax(axis=1), 0)
    return rows, int(np.minimum(last + 1, length).sum())


def device_memory() -> int | None:
    """Peak memory in bytes so far over the devices of this process; None on devices that do not report it (CPUs)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if entry and "peak_bytes_in_use" in entry]
    return max(peaks) if peaks else None

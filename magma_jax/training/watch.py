"""Monitoring of a run: metrics, a progress bar or log lines, samples, profiles, a summary.

Steps run asynchronously, and monitoring must not make the device wait. The metrics of a step are therefore read after
the next step has been dispatched; the read blocks until their own step is done, which also gives its time.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from magma_jax.config import ConfigError, to_dict
from magma_jax.runtime.distributed import is_main, log_main
from magma_jax.training.monitor.profiler import Profiler, StepRange
from magma_jax.training.monitor.throughput import Meter, Window, device_memory
from magma_jax.training.monitor.writers import METRICS_FILE, TENSORBOARD, JsonLines, TensorBoard, Wandb, Writer, Writers
from magma_jax.training.run.setup import Run
from magma_jax.training.step.flops import peak_flops
from magma_jax.training.step.optim import make_schedule, peak_rates

Metrics = Mapping[str, Any]


class Watch:
    """Monitors the steps of a run, from its current state to the config's last step.

        with Watch(run) as watch:  # starts the clock
            for step in ...:
                with watch.waiting():
                    batch = ...
                watch.begin(step, batch)
                run.state, metrics = ...
                watch.end(step, metrics)

    ``counts`` may be set to a function that returns further metrics whenever metrics are written.

    Only the first process writes and prints; all of them run the model for samples, since each holds part of it.

    Raises:
        ConfigError: samples or a profile that the run does not support, or a missing package.
    """

    def __init__(self, run: Run, profile: StepRange | None = None):
        self._run, config = run, run.config
        self.counts: Callable[[], dict[str, int]] = dict
        self._first = int(run.state.step)
        self._main = is_main()
        self._sampler = _make_panel(run, writing=self._main) if config.watch.samples_every else None
        tensorboard = run.workdir / TENSORBOARD
        profile = profile if self._main else None
        self._profiler = Profiler(profile, tensorboard, done=self._first, end=config.steps, say=log_main)
        writing = self._main and self._first < config.steps
        self._writers, self._seconds_before = _open_writers(run) if writing else (Writers([]), 0.0)
        mesh = run.program.mesh
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._peak = None if peak is None else peak * mesh.size
        self._rates = _learning_rates(run)
        self._flops: dict[Any, int] = {}
        self._compiled: set[Any] = set()
        self._compile_started: float | None = None
        self._compile_seconds = 0.0
        self._unwritten: dict[str, float] = {}
        self._batch: Mapping[str, np.ndarray] = {}
        self._last: Metrics = {}
        self._pending: tuple[int, Metrics, Window] | None = None

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the loop waits for a batch."""
        return self._meter.waiting()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context for work other than training, such as saving; it first waits for all steps."""
        self.flush()
        jax.block_until_ready(self._last)
        with self._meter.paused():
            yield

    def begin(self, step: int, batch: Mapping[str, np.ndarray]) -> None:
        """Call before ``step`` is dispatched; ``batch`` holds the rows of this process."""
        self._batch = batch
        if self._profiler.starts(step):
            with self.paused():
                self._profiler.start()
        shapes = tuple((name, array.shape) for name, array in sorted(batch.items()))
        if shapes not in self._compiled:
            self._compiled.add(shapes)
            self.flush()
            jax.block_until_ready(self._last)
            self._compile_started = self._meter.elapsed

    def end(self, step: int, metrics: Metrics) -> None:
        """Call after ``step`` was dispatched; ``metrics`` are arrays that may not be computed yet."""
        config = self._run.config
        self._last = metrics
        self._bar.update()
        if self._compile_started is None:
            samples, tokens, flops = self._size()
            self._meter.count(samples, tokens, flops)
        else:
            # A step that includes compilation is timed separately.
            jax.block_until_ready(metrics)
            seconds = self._meter.elapsed - self._compile_started
            self._meter.skip(seconds)
            self._compile_started = None
            self._compile_seconds += seconds
            self._unwritten["compile_seconds"] = self._unwritten.get("compile_seconds", 0.0) + seconds
            log_main(f"step {step} took {duration(seconds)}, compilation included")
        self.flush()
        if self._profiler.ends(step):
            with self.paused():
                self._profiler.close()
        if step % config.log_every == 0 or step == config.steps:
            metrics = {**metrics, **self._rates(self._run.state.opt_state)}
            for value in metrics.values():
                value.copy_to_host_async()
            self._pending = (step, metrics, self._meter.cut())
        if self._sampler and (step % config.watch.samples_every == 0 or step == config.steps):
            with self.paused():
                image = self._sampler(step, self._run.params)
                self._writers.image(step, "samples", image)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records further metrics of a step, such as a validation loss."""
        self._writers.scalars(step, values)

    def flush(self) -> None:
        """Reads and writes pending metrics; waits until their step is done."""
        if self._pending is None:
            return
        (step, metrics, window), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}
        values = {"seconds": self._seconds_before + self._meter.elapsed, **values}
        values |= self.counts() | self._meter.figures(window, self._peak) | self._unwritten
        self._unwritten = {}
        memory = device_memory()
        if memory is not None:
            values["device_memory_bytes"] = memory
        self._writers.scalars(step, values)
        self._show(step, values)

    def __enter__(self) -> "Watch":
        # disable=None: a bar on terminals only; elsewhere log lines replace it.
        self._bar = tqdm(
            total=self._run.config.steps,
            initial=self._first,
            bar_format="{n}/{total} |{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
            disable=None if self._main else True,
        )
        self._meter = Meter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._profiler.close()
            self._writers.close()
            self._bar.close()
        if kind is None:
            self._summary()

    def _size(self) -> tuple[int, int, int]:
        """Samples, tokens and operations of the global batch, extrapolated from the rows of this process."""
        config, program = self._run.config, self._run.program
        whole = {name: (config.batch_size, *array.shape[1:]) for name, array in self._batch.items()}
        shapes = tuple(sorted(whole.items()))
        if shapes not in self._flops:
            flops = program.family.flops(config.model, program.params, program.labels, whole, config.loss)
            self._flops[shapes] = flops.total
        samples, tokens = program.family.count(self._batch, self._run.dataset.tokenizer.pad_id)
        share = len(next(iter(self._batch.values()))) / config.batch_size
        return round(samples / share), round(tokens / share), self._flops[shapes]

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        loss, steps = f"loss {values['loss']:.3f}", self._run.config.steps
        short, long = [loss], [f"step {step}/{steps}", loss]
        if "step_seconds" in values:
            samples, wait = f"{values['samples_per_second']:.0f} samples/s", f"data wait {values['input_wait']:.0%}"
            tokens = "{:.3g}{} tokens/s".format(*scaled(values["tokens_per_second"]))
            flops = "{:.3g} {}FLOP/s".format(*scaled(values["model_flops_per_second"]))
            mfu = [f"MFU {values['mfu']:.1%}"] if "mfu" in values else []
            short += [samples, *mfu, wait]
            long += [samples, tokens, flops, *mfu, wait]
            long += [duration((steps - step) * values["step_seconds"]) + " left"] if step < steps else []
        self._bar.set_postfix_str(", ".join(short))
        if self._bar.disable:
            log_main("  ".join(long))

    def _summary(self) -> None:
        total, meter = self._meter.total, self._meter
        training = meter.elapsed - meter.paused_seconds - self._compile_seconds
        if not total.steps or training <= 0:
            return
        tokens = "{:.3g}{}".format(*scaled(total.tokens / training))
        log_main(
            f"steps {self._first + 1} to {int(self._run.state.step)} took {duration(meter.elapsed)}: "
            f"{total.samples / training:.0f} samples/s, {tokens} tokens/s; beside that "
            f"{duration(self._compile_seconds)} compiling, {duration(meter.paused_seconds)} samples and checkpoints"
        )


def _make_panel(run: Run, *, writing: bool) -> Any:
    panel = run.program.family.panel
    if panel is None:
        raise ConfigError(
            f"watch.samples_every: a model of the family {run.program.family.name} has no samples to show; set it to 0"
        )
    return panel(run, writing=writing)


def _open_writers(run: Run) -> tuple[Writers, float]:
    """The writers of a run, and the seconds it took before it was resumed."""
    watch, step, folder = run.config.watch, int(run.state.step), Path(run.workdir)
    lines = JsonLines(folder / METRICS_FILE, step)
    writers: list[Writer] = [lines]
    if watch.wandb is not None:
        writers.append(Wandb(folder, watch.wandb, to_dict(run.config)))
    if watch.tensorboard:
        writers.append(TensorBoard(folder / TENSORBOARD, step))
    return Writers(writers), float(lines.last.get("seconds", 0.0))


def _learning_rates(run: Run) -> Any:
    """Builds the function from optimizer state to the learning rates of its last update, one per trained group.

    The rates are device arrays. The optimizer counts its own updates, so skipped steps do not count.
    """
    optim = run.config.optim
    schedules = {name: make_schedule(optim, peak) for name, peak in peak_rates(optim).items()}

    def rates(opt_state: Any) -> dict[str, Any]:
        leaves = jax.tree.leaves(opt_state, is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByScheduleState))
        updates = next(leaf.count for leaf in leaves if isinstance(leaf, optax.ScaleByScheduleState))
        return {name: schedule(jnp.maximum(updates - 1, 0)) for name, schedule in schedules.items()}

    return jax.jit(rates)


def duration(seconds: float | int) -> str:
    """Human-readable duration: ``52 s``, ``5 min 12 s``, ``3 h 20 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def scaled(value: float | int) -> tuple[float | int, str]:
    """A number below 1000 and its metric prefix: ``(12.3, "k")``."""
    for letter in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return value, letter
        value /= 1000
    return value, "P"

"""The training loop: weights, state, steps, checkpoints, progress. It knows no model family and no data set by name."""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from magma_jax.config import ConfigError, to_dict
from magma_jax.data.datasets import DataConfig, Dataset, load_dataset
from magma_jax.models import MODELS, ModelConfig
from magma_jax.nn.modules import Params, abstract, parameter_count, split
from magma_jax.training.checkpoint import RunCheckpoints
from magma_jax.training.early_stopping import ValidationConfig
from magma_jax.training.losses import LOSSES, LossOptions
from magma_jax.training.model_folder import MODEL_FILE, read_model_json, read_params, write_model_folder
from magma_jax.training.optim import OptimConfig, label_parameters, make_optimizer, partition
from magma_jax.training.pictures import feature_statistics, picture_loader
from magma_jax.training.step import TrainState, init_state, make_train_step
from magma_jax.training.weights import load_weights

METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        model: what is trained.
        data: what it is trained on.
        optim: who learns and how.
        loss: how the forward pass of training runs.
        weights: path prefix to the name of a pretrained part, see ``training.weights``; the rest starts fresh.
        steps: optimizer steps.
        batch_size: samples a step.
        accumulate: parts that a batch is run in, to save memory.
        seed: of fresh weights, data order and dropout.
        log_every: steps between lines of metrics.
        checkpoint_every: steps between checkpoints; the last step is always one.
        keep_checkpoints: newest checkpoints that are kept, beside that of the best validation.
        validation: when the run is validated and ends early.
        evaluate: whether the run ends with the evaluation of ``eval.py``.
    """

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    loss: LossOptions = LossOptions()
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    validation: ValidationConfig = ValidationConfig()
    evaluate: bool = False

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        if self.optim.steps is None:
            object.__setattr__(self, "optim", dataclasses.replace(self.optim, steps=self.steps))
        if self.optim.steps and self.optim.warmup_steps >= self.optim.steps:
            raise ValueError(f"optim.warmup_steps {self.optim.warmup_steps} leave nothing of {self.optim.steps} steps")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")


@dataclasses.dataclass
class Run:
    """A run that is ready to train or has been trained."""

    config: RunConfig
    workdir: Path
    dataset: Dataset
    graphdef: nnx.GraphDef
    frozen: Params
    state: TrainState


def train(config: RunConfig, workdir: str | Path) -> Run:
    """Trains, or goes on where the run folder's newest checkpoint ends.

    Raises:
        ConfigError: the folder holds a run of another config.
    """
    workdir = Path(workdir)
    say(f"preparing data: {config.data.name}")
    dataset = load_dataset(config.data)
    graphdef, shapes, types = abstract(functools.partial(_create, config))
    labels = label_parameters(types, config.optim.groups)
    optimizer = make_optimizer(config.optim, labels)
    _prepare_folder(config, workdir, dataset, graphdef, shapes)

    # The base folder holds every parameter as the run started; what learns is replaced by the checkpoint's.
    trainable, frozen, statistics = partition(read_params(workdir, shapes), labels)
    # Under jit the fresh state is committed to the devices of the weights, as every later state is: a state that
    # is not would compile the step a second time.
    state = jax.jit(functools.partial(init_state, optimizer=optimizer))(trainable, statistics)
    say(
        f"model: {parameter_count(trainable):,} parameters learn, "
        f"{parameter_count(frozen):,} are frozen; {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    batches = iter(dataset.batches(config.batch_size, config.seed))
    with RunCheckpoints(workdir, writing=True) as checkpoints:
        if checkpoints.latest_step() is not None:
            state, position = checkpoints.restore(state)
            batches.set_state(position)
            say(f"resuming after step {int(state.step)}")
        run = Run(config, workdir, dataset, graphdef, frozen, state)
        prepare = picture_loader(
            dataset.images, graphdef, {**frozen, **trainable, **statistics}, labels, config.loss.batch_norm
        )
        _steps(run, optimizer, batches, prepare, checkpoints)
    return run


def say(message: str) -> None:
    """One line for whoever watches the run."""
    print(message, file=sys.stderr, flush=True)


def _steps(
    run: Run,
    optimizer: Any,
    batches: Iterator,
    prepare: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    checkpoints: RunCheckpoints,
) -> None:
    config = run.config
    loss = functools.partial(LOSSES[config.model.kind], options=config.loss)
    step_function = jax.jit(
        make_train_step(run.graphdef, loss, optimizer, accumulate=config.accumulate), donate_argnums=0
    )
    key = jax.random.key(config.seed)
    first = int(run.state.step)
    started = time.perf_counter()
    metrics_file = (run.workdir / METRICS_FILE).open("a")
    # disable=None: a bar on a terminal, nothing elsewhere, where the lines of metrics tell instead.
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=None)
    with metrics_file, bar:
        for step in range(first, config.steps):
            run.state, metrics = step_function(run.state, run.frozen, prepare(next(batches)), key)
            bar.update()
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                values = {name: float(value) for name, value in metrics.items()}
                if not np.isfinite(values["loss"]):
                    raise FloatingPointError(f"loss is {values['loss']} at step {done}; lower optim.learning_rate")
                elapsed = time.perf_counter() - started
                values["samples_per_second"] = (done - first) * config.batch_size / elapsed
                metrics_file.write(json.dumps({"step": done, "seconds": elapsed, **values}) + "\n")
                metrics_file.flush()
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['samples_per_second']:.0f} samples/s")
                if bar.disable:
                    left = (config.steps - done) * elapsed / (done - first)
                    say(
                        f"step {done}/{config.steps}  loss {values['loss']:.3f}  "
                        f"{values['samples_per_second']:.0f} samples/s  {left:.0f} s left"
                    )
            if done % config.checkpoint_every == 0 or done == config.steps:
                checkpoints.save(done, run.state, batches.get_state())


def _create(config: RunConfig) -> nnx.Module:
    return MODELS[config.model.kind](config.model, rngs=nnx.Rngs(config.seed))


def _prepare_folder(
    config: RunConfig, workdir: Path, dataset: Dataset, graphdef: nnx.GraphDef, shapes: Mapping[str, Any]
) -> None:
    """Writes the run's base folder, or checks that the one there belongs to this config."""
    if (workdir / MODEL_FILE).exists():
        theirs = read_model_json(workdir).get("run")
        changed = _differences(theirs or {}, to_dict(config))
        # More steps of the same schedule continue a run; anything else would make another run of it.
        changed = [name for name in changed if name not in ("steps", "evaluate", "log_every", "checkpoint_every")]
        if changed:
            raise ConfigError(
                f"{workdir}: holds a run with another config ({', '.join(changed[:5])}); choose another --workdir"
            )
        return
    pretrained = load_weights(config.weights, shapes)
    missing = [path for path in shapes if path not in pretrained]

    def fresh() -> Params:
        params = split(_create(config))[1]
        return {path: params[path] for path in missing}

    # Under jit only what is returned is computed: pretrained parts are not first filled with noise.
    params = {**pretrained, **jax.jit(fresh)()}
    params = {path: jnp.asarray(params[path], shapes[path].dtype) for path in shapes}
    if dataset.images is not None:
        learned = dataset.images if dataset.learned is None else dataset.images[np.asarray(dataset.learned)]
        params |= feature_statistics(learned, graphdef, params)
    metadata = {"model": to_dict(config.model), "groups": dict(config.optim.groups), "run": to_dict(config)}
    write_model_folder(workdir, metadata, params, lambda folder: dataset.tokenizer.save(folder / "tokenizer"))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key in sorted(set(old) | set(new)):
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            names += _differences(old[key], new[key], f"{prefix}{key}.")
        elif old.get(key) != new.get(key):
            names.append(prefix + key)
    return names

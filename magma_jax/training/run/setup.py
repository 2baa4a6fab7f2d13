"""Setup of a run from its config: data, run folder, starting weights, state."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magma_jax.config import ConfigError
from magma_jax.data.dataset import Dataset
from magma_jax.data.datasets import load_dataset
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.family import Family
from magma_jax.nn.modules import parameter_count
from magma_jax.runtime.compile import trim_after_compile
from magma_jax.runtime.distributed import broadcast_from_main, json_from_main, log_main
from magma_jax.runtime.sharding import make_mesh
from magma_jax.storage.model_folder import MODEL_FILE, CheckpointError, read_params
from magma_jax.training.checkpoints.early_stopping import BestStep
from magma_jax.training.checkpoints.run_lock import writer_of
from magma_jax.training.run.config import RunConfig, completed
from magma_jax.training.run.continuation import continued_config
from magma_jax.training.run.program import Program, build_program
from magma_jax.training.run.starting_weights import write_run_folder
from magma_jax.training.step.optim import partition
from magma_jax.training.step.train_step import TrainState
from magma_jax.typing import Params


@dataclasses.dataclass
class Run:
    """A run that is ready to train or has been trained.

    Attributes:
        frozen: frozen parameters.
        state: train state.
        best: the best validated step so far.
        interrupted: whether a signal stopped it before its end.
    """

    config: RunConfig
    workdir: Path
    dataset: Dataset
    program: Program
    frozen: Params
    state: TrainState
    best: BestStep = BestStep()
    interrupted: bool = False

    @property
    def params(self) -> Params:
        """All current parameters and statistics."""
        return {**self.frozen, **self.state.trainable, **self.state.statistics}


def prepare_run(
    family: Family,
    config: RunConfig,
    workdir: str | Path,
    devices: Sequence[Any] | None = None,
    *,
    resume: bool = True,
) -> Run:
    """Creates or opens the run folder; the returned state is that before the first step.

    Raises:
        ConfigError: the folder holds a run that may not be continued, see ``training.run.continuation``, or the config
            does not fit the devices. CheckpointError: another process is training in the folder.
    """
    trim_after_compile()
    workdir, config = Path(workdir), completed(family, config)
    exists = broadcast_from_main((workdir / MODEL_FILE).exists())
    if exists:
        # The authoritative check, before anything is written.
        if (problem := json_from_main(lambda: writer_of(workdir))) is not None:
            raise CheckpointError(problem)
        config, notes = continued_config(family, config, workdir, resume=resume)
        for note in notes:
            log_main(note)
    program = build_program(family, config, make_mesh(config.mesh, devices))
    log_main(f"preparing data: {config.data.kind}")
    dataset = load_dataset(config.data)
    _check_vocabulary(program, dataset)
    if not exists:
        write_run_folder(program, workdir, dataset)
    # The run folder holds every parameter as of the start; a checkpoint replaces the trained ones.
    params = read_params(workdir, program.params)
    frozen = partition(params, program.labels)[1]
    state = program.init_state(params)
    log_main(
        f"model: {parameter_count(state.trainable):,} parameters learn, {parameter_count(frozen):,} are frozen; "
        f"{program.mesh.size} {program.mesh.devices.flat[0].platform} device(s)"
    )
    return Run(config=config, workdir=workdir, dataset=dataset, program=program, frozen=frozen, state=state)


def _check_vocabulary(program: Program, dataset: Dataset) -> None:
    # Without the image placeholder, which never occurs in text.
    size, rows = dataset.tokenizer.vocab_size, program.family.vocab_rows(program.config.model)
    if size > rows:
        raise ConfigError(
            f"the tokenizer has {size} tokens, but the model embeds {rows}; set data.tokenizer to that of the model"
        )
    if program.family.begin is not None and isinstance(dataset.tokenizer, Tokenizer):
        check_begin(dataset.tokenizer, program.family.begin(program.config.model))


def check_begin(tokenizer: Tokenizer, begin: int | None) -> None:
    """Raises ConfigError unless sequences begin with the token ``begin`` as the tokenizer says."""
    if tokenizer.begin_id != begin:
        puts = "no token" if tokenizer.begin is None else f"{tokenizer.begin!r} (id {tokenizer.begin_id})"
        raise ConfigError(
            f"the tokenizer puts {puts} before every sequence, but model.begin is {begin}; set it to "
            f"{tokenizer.begin_id}, or take the model's own tokenizer"
        )

"""Setup of a run from its config: data, run folder, starting weights, state."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magma_jax.config import ConfigError
from magma_jax.data.dataset import Dataset
from magma_jax.data.datasets import load_dataset
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.family import Family
from magma_jax.nn.modules import parameter_count
from magma_jax.output import object_address
from magma_jax.runtime.compile import trim_after_compile
from magma_jax.runtime.distributed import broadcast_from_main, json_from_main, log_main
from magma_jax.runtime.sharding import make_mesh
from magma_jax.storage.model_folder import MODEL_FILE, CheckpointError, read_params
from magma_jax.storage.objects.copies import WorkingCopy, local_copy
from magma_jax.training.checkpoints.bucket_lock import bucket_writer
from magma_jax.training.checkpoints.early_stopping import BestStep
from magma_jax.training.checkpoints.run_lock import writer_of
from magma_jax.training.run.config import RunConfig, completed
from magma_jax.training.run.continuation import continued_config
from magma_jax.training.run.mounted import rename_problem
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
        copy: working copy of a run folder in object storage, to which ``workdir`` belongs; None for one on a disk.
    """

    config: RunConfig
    workdir: Path
    dataset: Dataset
    program: Program
    frozen: Params
    state: TrainState
    best: BestStep = BestStep()
    interrupted: bool = False
    copy: WorkingCopy | None = None

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
            does not fit the devices. CheckpointError: another process is training in the folder, or no checkpoint
            could be finished on its disk. StoreError: a bucket that cannot be read.
    """
    trim_after_compile()
    config, folder = completed(family, config), workdir
    copy = _working_copy(workdir)
    workdir = Path(workdir) if copy is None else copy.folder
    if copy is None and (problem := json_from_main(lambda: rename_problem(Path(folder)))) is not None:
        raise CheckpointError(problem)
    exists = broadcast_from_main((workdir / MODEL_FILE).exists())
    if exists:
        # The authoritative check, before anything is written.
        if (problem := json_from_main(lambda: bucket_writer(copy.store) if copy else writer_of(workdir))) is not None:
            raise CheckpointError(problem)
        config, notes = continued_config(family, config, workdir, resume=resume, shown=folder)
        for note in notes:
            log_main(note)
    elif config.base is not None:
        local_copy(config.base)  # what is in object storage is fetched, or refused, before the data are prepared
    program = build_program(family, config, make_mesh(config.mesh, devices))
    log_main(f"preparing data: {config.data.kind}")
    dataset = load_dataset(config.data)
    _check_vocabulary(program, dataset)
    if not exists:
        write_run_folder(program, workdir, dataset, copy)
    # The run folder holds every parameter as of the start; a checkpoint replaces the trained ones.
    params = read_params(workdir, program.params)
    frozen = partition(params, program.labels)[1]
    state = program.init_state(params)
    log_main(
        f"model: {parameter_count(state.trainable):,} parameters learn, {parameter_count(frozen):,} are frozen; "
        f"{program.mesh.size} {program.mesh.devices.flat[0].platform} device(s)"
    )
    return Run(
        config=config,
        workdir=workdir,
        dataset=dataset,
        program=program,
        frozen=frozen,
        state=state,
        copy=copy,
    )


def _working_copy(workdir: str | Path) -> WorkingCopy | None:
    """The working copy of a run folder in object storage, with its files; None for a local path."""
    if (address := object_address(workdir)) is None:
        return None
    # Orbax wants the same path in all processes; those of one machine share the folder.
    copy = WorkingCopy(address, json_from_main(lambda: tempfile.mkdtemp(prefix="magma_jax-")))
    copy.remove_at_exit()
    copy.fetch()
    return copy


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

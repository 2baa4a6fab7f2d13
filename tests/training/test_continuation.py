"""Which changes of a config continue a run, and what is said about the others."""

import dataclasses
import json

import pytest

from magma_jax.config import ConfigError, to_dict
from magma_jax.families import family_of
from magma_jax.families.magma import MAGMA
from magma_jax.runtime.sharding import MeshConfig
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.run.config import completed
from magma_jax.training.run.continuation import continued_config
from magma_jax.training.step.options import LossOptions
from tests import tiny


def run_config(**changes):
    return completed(MAGMA, tiny.run_config(**changes))


@pytest.fixture
def folder(tmp_path):
    def write(config, **changes):
        stored = {**to_dict(config), **changes}
        (tmp_path / "model.json").write_text(json.dumps({"model": {}, "run": stored}))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate": True, "log_every": 7, "checkpoint_every": 3, "keep_checkpoints": 5},
        {"mesh": MeshConfig(fsdp=2), "accumulate": 2, "loss": LossOptions(remat="full")},
        {"validation": ValidationConfig(every=1, patience=2, min_delta=0.5)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_leaves_the_result_alone_may_change(folder, changes):
    config = run_config(**changes)
    assert continued_config(family_of(config.model), config, folder(run_config())) == (config, [])


def test_the_message_says_what_differs(folder):
    workdir = folder(run_config())
    data = dataclasses.replace(run_config().data, length=16)
    changed = run_config(seed=3, data=data, validation=ValidationConfig(samples=7), log_every=9)
    with pytest.raises(ConfigError) as caught:
        continued_config(family_of(changed.model), changed, workdir)
    assert str(caught.value) == (
        f"{workdir}: holds a run with another config (data.length is 32 there and 16 here, seed is 0 there and 3 here, "
        "validation.samples is 512 there and 7 here); choose another --workdir, and to start from this run's result "
        f"there add --set base={workdir}"
    )


def test_parts_of_a_batch_matter_to_its_statistics(folder):
    batch = LossOptions(batch_norm="batch")
    with pytest.raises(ConfigError, match="accumulate is 1 there and 2 here"):
        continued_config(MAGMA, run_config(accumulate=2, loss=batch), folder(run_config(loss=batch)))


def test_fields_that_are_younger_than_the_run_have_their_defaults(folder):
    workdir = folder(run_config())
    stored = json.loads((workdir / "model.json").read_text())
    del stored["run"]["validation"], stored["run"]["optim"]["eps"]
    (workdir / "model.json").write_text(json.dumps(stored))
    assert continued_config(MAGMA, run_config(), workdir)[1] == []


def test_fields_that_are_gone_are_listed(folder):
    with pytest.raises(ConfigError, match="shoe_size is 43 there and None here"):
        continued_config(MAGMA, run_config(), folder(run_config(), shoe_size=43))


def test_without_resume_a_run_is_refused(folder):
    workdir = folder(run_config())
    with pytest.raises(ConfigError, match="holds a run; choose another --workdir, or continue it without --no-resume"):
        continued_config(MAGMA, run_config(), workdir, resume=False)


def test_a_converted_model_is_no_run(folder):
    workdir = folder(run_config())
    (workdir / "model.json").write_text('{"model": {}}')
    with pytest.raises(ConfigError, match="holds a model that was not trained here"):
        continued_config(MAGMA, run_config(), workdir)


def _of_length(steps, **optim):
    """A config that leaves the length of the schedule to the number of steps."""
    return run_config(steps=steps, optim=dataclasses.replace(run_config().optim, steps=None, **optim))


def test_more_steps_keep_the_schedule_and_say_so(folder):
    workdir = folder(_of_length(4))
    config, notes = continued_config(MAGMA, _of_length(8), workdir)
    assert (config.steps, config.optim.steps) == (8, 4)
    note = "the schedule of the learning rates keeps the 4 steps that the run started with"
    assert notes == [f"{note}; after them they stay at 0.001 and 0.0001"]
    config, notes = continued_config(MAGMA, _of_length(2), workdir)
    assert (config.steps, config.optim.steps, notes) == (2, 4, [note])


def test_a_schedule_of_a_named_length_needs_no_words_but_must_stay(folder):
    workdir = folder(_of_length(4))
    named = dataclasses.replace(_of_length(8), optim=_of_length(4).optim)
    assert continued_config(family_of(named.model), named, workdir) == (named, [])
    other = dataclasses.replace(_of_length(8), optim=_of_length(6).optim)
    with pytest.raises(ConfigError, match=r"optim.steps is 4 there and 6 here"):
        continued_config(family_of(other.model), other, workdir)


def test_more_steps_at_rate_zero_are_refused(folder):
    decays = {"schedule": "warmup_decay", "warmup_steps": 1}
    with pytest.raises(ConfigError, match=r"\(warmup_decay\) has fallen to zero after 4 steps"):
        continued_config(MAGMA, _of_length(8, **decays), folder(_of_length(4, **decays)))

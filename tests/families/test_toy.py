"""A family from outside trains, validates, resumes, is sharded, planned and counted, and is opened from its folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.config import ConfigError
from magma_jax.evaluation.own_split import evaluate_run
from magma_jax.families import FAMILIES, family_of, open_token_generator
from magma_jax.family import Family
from magma_jax.generate.__main__ import main as generate
from magma_jax.nn.modules import merge
from magma_jax.plan.chips import CHIPS, Topology
from magma_jax.plan.compilation import compile_decode, compile_step
from magma_jax.plan.report import make_plan
from magma_jax.runtime.sharding import MeshConfig, make_mesh
from magma_jax.serve.__main__ import main as serve
from magma_jax.storage.model_folder import read_model_json
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.loop import train
from magma_jax.training.monitor.writers import WatchConfig
from magma_jax.training.run import setup
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import build_program
from magma_jax.training.run.stored import read_stored_run
from magma_jax.training.step.flops import matmul_flops
from magma_jax.training.step.optim import OptimConfig
from tests.families import toy
from tests.families.toy import LENGTH, TOY, CountingConfig, ToyConfig

ONE = jax.devices()[:1]


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    data = toy.dataset()
    monkeypatch.setattr(setup, "load_dataset", lambda config: data)


def run_config(**changes):
    config = RunConfig(
        model=ToyConfig(),
        data=CountingConfig(),
        optim=OptimConfig(learning_rate=1e-2),
        steps=6,
        batch_size=8,
        log_every=1,
        checkpoint_every=2,
        validation=ValidationConfig(every=3, split="test", samples=16),
        watch=WatchConfig(tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        data = toy.dataset()
        patch.setattr(setup, "load_dataset", lambda config: data)
        return train(TOY, run_config(), tmp_path_factory.mktemp("toy") / "run", ONE)


def lines(run):
    return [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_trains_and_validates(finished):
    trained = [line for line in lines(finished) if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert trained[-1]["loss"] < trained[0]["loss"]
    for line in trained:
        assert line["loss"] == pytest.approx(line["tokens"] + 0.1 * line["length"], rel=1e-6)
    validated = [line for line in lines(finished) if "validation_loss" in line]
    assert [line["step"] for line in validated] == [3, 6]
    assert {"validation_tokens", "validation_length"} <= validated[0].keys()


def test_it_resumes_to_the_bit(finished, tmp_path):
    config = run_config()
    train(
        TOY,
        dataclasses.replace(config, steps=3, optim=dataclasses.replace(config.optim, steps=6)),
        tmp_path / "run",
        ONE,
    )
    run = train(TOY, config, tmp_path / "run", ONE)
    for path, leaf in finished.state.trainable.items():
        np.testing.assert_array_equal(leaf, run.state.trainable[path])


def test_it_is_opened_from_its_folder(finished):
    config = read_stored_run(TOY, read_model_json(finished.workdir)["run"])
    assert config.model == ToyConfig()
    opened = TOY.open(finished.workdir)
    for path, leaf in finished.state.trainable.items():
        np.testing.assert_array_equal(leaf, opened.params[path])
    tokens = jnp.asarray(next(iter(toy.dataset().batches(2, 0, [0, 1])))["tokens"])
    model = merge(opened.graphdef, opened.params)
    hidden, later = model(tokens), model(tokens.at[:, 5].set(11))
    assert not np.array_equal(hidden[:, 0], later[:, 0])  # it looks both ways


def test_parts_of_a_batch_and_eight_devices_give_the_same_step(finished, tmp_path):
    """The counts of its two terms differ from part to part."""
    first = next(line for line in lines(finished) if "loss" in line)
    mesh = run_config(steps=1, mesh=MeshConfig(data=2, fsdp=2, model=2))
    sharded = train(TOY, mesh, tmp_path / "mesh")
    leaf = sharded.state.trainable["table/weight"]
    assert len(leaf.sharding.device_set) == 8
    assert leaf.sharding.shard_shape(leaf.shape) == (512, 8)
    assert next(line for line in lines(sharded) if "loss" in line)["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_it_is_planned_and_counted():
    config = run_config(mesh=MeshConfig(fsdp=8), batch_size=16)
    program = build_program(TOY, config, make_mesh(config.mesh))
    topology = Topology("v5e:2x4", CHIPS["v5e"], tuple(jax.devices()))
    plan = make_plan(program, topology, compile_step(program), "train", 16)
    assert plan.fits
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in TOY.batch_shapes(program).items()}
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in program.params.items()}

    def total(params):
        return TOY.loss(merge(program.graphdef, params), batch_values, None, options=None)["tokens"].total

    batch_values = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in batch.items()}
    traced = matmul_flops(jax.make_jaxpr(jax.grad(total))(shapes).jaxpr)
    # The length head stands beside what was traced; the table's gradient is no matmul of its own.
    head = 6 * 16 * 32 * 17
    assert plan.model_flops.total - head == pytest.approx(traced, rel=0.01)
    assert plan.model_flops.attention == 16 * 12 * LENGTH**2 * 32 * 2


def test_a_family_that_makes_no_text_is_refused_by_the_commands_in_one_line(finished, monkeypatch, capsys):
    run = str(finished.workdir)
    assert generate(["--checkpoint", run, "a text"]) == 2
    assert f"{run}: holds a model of kind 'toy'; there are magma, gptj" in capsys.readouterr().err
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    assert generate(["--checkpoint", run, "a text"]) == 2
    nothing = "this model makes nothing that a prompt asks for, no text; give a checkpoint of one that does"
    assert capsys.readouterr().err == f"magma_jax.generate: {run}: {nothing}\n"
    refused = f"{run}: a toy model does not write text token by token; give a checkpoint of another family "
    assert generate(["--checkpoint", run, "a text", "--stream"]) == 2
    assert capsys.readouterr().err == f"magma_jax.generate: {refused}(magma, language)\n"
    assert serve(["--checkpoint", run, "--port", "0"]) == 2
    neither = "neither writes text token by token nor draws images; a model that draws needs its image tokenizer"
    assert capsys.readouterr().err == f"magma_jax.serve: {run}: {neither}\n"
    with pytest.raises(ValueError, match="a toy model does not write text token by token"):
        evaluate_run(open_token_generator, finished.workdir)
    with pytest.raises(ConfigError, match="a toy model does not decode; plan its training"):
        compile_decode(build_program(TOY, run_config(), make_mesh(MeshConfig(), jax.devices()[:1])), 2)


def test_a_family_must_be_complete_and_known(tmp_path):
    with pytest.raises(TypeError, match=r"missing .* 'loss'"):
        Family(name="half")
    with pytest.raises(ConfigError, match="ToyConfig: no family has such models; there are magma, language"):
        family_of(ToyConfig())
    with pytest.raises(ConfigError, match="a model of the family toy has no samples to show"):
        train(TOY, run_config(watch=WatchConfig(samples_every=1, tensorboard=False)), tmp_path / "run", ONE)

"""Plans of a tiny run: on eight devices of the CPU, which need no TPU compiler, and one with it."""

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest

from magma_jax.config import ConfigError
from magma_jax.families import family_of
from magma_jax.plan import chips
from magma_jax.plan.__main__ import main
from magma_jax.plan.chips import CHIPS, Topology, open_topology
from magma_jax.plan.compilation import Compiled, batch_structs, compile_decode, compile_step
from magma_jax.plan.hlo import Collective, Costs, Shape
from magma_jax.plan.report import Plan, frozen_gathers, make_plan, to_json, to_text
from magma_jax.runtime.sharding import MeshConfig, make_mesh
from magma_jax.training.run.program import build_program
from magma_jax.training.step.options import LossOptions
from tests import tiny

BATCH, LENGTH = 8, 32


def program(**changes):
    config = tiny.run_config(batch_size=BATCH, mesh=MeshConfig(fsdp=4), loss=LossOptions(remat="full"), **changes)
    return build_program(family_of(config.model), config, make_mesh(config.mesh))


@pytest.fixture(scope="module")
def plan() -> Plan:
    built = program()
    topology = Topology("v5e:2x4", CHIPS["v5e"], tuple(jax.devices()))
    return make_plan(built, topology, compile_step(built), "train", BATCH)


def test_the_step_that_is_planned_is_the_one_that_runs(plan):
    """Remat of the layers costs about a forward pass more than the count of the model."""
    assert plan.fits
    assert plan.costs.unknown_loops == 0
    assert 1.0 < plan.costs.flops * 8 / plan.model_flops.total < 1.8
    memory = plan.compiled.memory
    state = program().state
    mine = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state))
    assert memory.arguments > 4 * mine
    assert memory.total == memory.arguments + memory.outputs + memory.temporaries + memory.code
    assert any(traffic.in_loops for traffic in plan.traffic)


def test_roofline_is_the_longest_of_three(plan):
    chip = plan.topology.chip
    assert plan.terms["compute"] == plan.costs.flops / chip.peak_flops
    assert plan.terms["hbm"] == plan.costs.hbm_bytes / chip.hbm_bandwidth
    assert plan.seconds == max(plan.terms.values())
    assert plan.mfu == pytest.approx(plan.model_flops.total / (8 * 197e12 * plan.seconds))


def test_text_and_json_tell_the_same(plan):
    text, values = to_text(plan), json.loads(json.dumps(to_json(plan)))
    assert f"{values['mfu']:.1%}" in text
    assert f"{values['memory']['total'] / 2**30:8.2f} of 16: fits" in text
    assert values["mesh"] == {"slice": 1, "data": 2, "fsdp": 4, "model": 1}
    assert values["roofline"]["seconds"] == plan.seconds


def test_what_crosses_from_slice_to_slice_has_a_bound_of_its_own(plan):
    between = Collective("all-reduce", (Shape("f32", (8,), True),), 2, 2.0**30, 3, True, between_slices=True)
    topology = Topology("v5e:2x2", CHIPS["v5e"], tuple(jax.devices()), slices=2)
    costs = dataclasses.replace(plan.costs, collectives=(*plan.costs.collectives, between))
    sliced = dataclasses.replace(plan, topology=topology, costs=costs)
    assert "dcn" not in plan.terms
    assert sliced.terms == plan.terms | {"dcn": 3 * 2**30 / 3.125e9}
    assert sliced.seconds == sliced.terms["dcn"]
    text, values = to_text(sliced), to_json(sliced)
    assert "on 2 x v5e:2x2: 8 devices" in text
    assert "each slice receives 12.000 GiB from others in one step" in text
    learned = sum(leaf.size for leaf in program().state.trainable.values())
    assert values["gradient_bytes"] == 4 * learned
    assert values["from_slices"] == 3 * 2**30
    assert values["collectives"][-1]["between_slices"]


def test_gathers_of_frozen_weights_are_told_from_those_that_learn():
    def gather(dims, loop=True, dtype="bf16"):
        return Collective("all-gather", (Shape(dtype, dims, True),), 4, 1.0, 2, loop)

    adapter, c_fc = (8, 32), (1, 32, 64)
    costs = Costs(0.0, 0.0, (gather(adapter), gather(c_fc), gather(c_fc, loop=False), gather(c_fc, dtype="s32")), 0)
    assert frozen_gathers(program(), costs) == 2


def test_what_does_not_fit_says_so():
    built = program()
    topology = Topology("v5e:2x4", CHIPS["v5e"], tuple(jax.devices()))
    refused = Compiled(None, "Used 20G of 16G", "", 1.0, 1.0)
    planned = make_plan(built, topology, refused, "train", BATCH)
    assert not planned.fits
    assert "does not fit: Used 20G of 16G" in to_text(planned)
    assert to_json(planned)["fits"] is False


def test_batches_are_those_of_the_loop():
    shapes = batch_structs(program())
    length = tiny.run_config().data.length
    assert {name: leaf.shape for name, leaf in shapes.items()} == {
        "tokens": (BATCH, length),
        "labels": (BATCH, length),
        "images": (BATCH, 64, 64, 3),
    }
    groups = tiny.run_config().optim.groups | {"encoder": "frozen"}
    frozen = program(optim=dataclasses.replace(tiny.run_config().optim, groups=groups))
    assert batch_structs(frozen)["features"].shape == (BATCH, 4, 32)


def test_a_decoding_step_reads_the_cache_in_place():
    built = program()
    compiled = compile_decode(built, BATCH, slots=64)
    cache = 2 * 2 * BATCH * 64 * 32 * 4 // 8  # keys and values, layers, rows, slots, width, fp32, devices
    assert cache <= compiled.memory.arguments
    assert compiled.memory.outputs < cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v7:4x4"], "expected CHIP:SHAPE"),
        (["--topology", "v5e:4by4"], "expected CHIP:SHAPE"),
        (["--topology", "v5e:2x2", "--set", "nonsense=1"], "unknown key"),
        (["--topology", "v4:2x2x1", "--set", "mesh.slice=2"], "between slices of v4 is not published"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["--config", "configs/quickstart.py", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("magma_jax.plan: ")
    assert message in error


def test_without_the_compiler_the_command_to_install_it_is_told(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'libtpu==0\.0\.\d+"):
        open_topology("v5e:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x1x1"])
def test_a_chip_has_the_name_that_its_devices_have(name):
    topology = open_topology(name)
    assert {device.device_kind for device in topology.devices} == {topology.chip.kind}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(("name", "slices", "devices"), [("v4:2x2x1", 1, 4), ("tpu7x:2x1x1", 1, 4), ("v5e:2x2", 2, 8)])
def test_a_tpu_plan(name, slices, devices):
    topology = open_topology(name, slices)
    assert len(topology.devices) == devices
    batch = 2 * devices
    config = tiny.run_config(batch_size=batch, mesh=MeshConfig(fsdp=4, slice=slices))
    built = build_program(family_of(config.model), config, make_mesh(config.mesh, topology.devices))
    planned = make_plan(built, topology, compile_decode(built, batch, slots=64), "generate", batch)
    assert planned.fits
    assert planned.costs.unknown_loops == 0
    layers = 2 * (12 * 32 * 32 - 8 * 32 * 32 + 2 * 32 * 64) + 2 * 2 * 2 * 2 * 32 * 8 // 2
    assert planned.costs.flops * devices > 2 * batch * layers / 2
    assert jnp.isfinite(planned.seconds)

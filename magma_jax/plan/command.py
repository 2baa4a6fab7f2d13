"""Implementation of ``python -m magma_jax.plan``."""

import argparse
import dataclasses
import json
import sys

import jax

from magma_jax.config import apply_overrides, load_config_file
from magma_jax.families import family_of, run_config
from magma_jax.plan.chips import open_topology
from magma_jax.plan.compilation import compile_decode, compile_step
from magma_jax.plan.report import Plan, make_plan, to_json, to_text
from magma_jax.runtime.sharding import make_mesh
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import build_program


def run(arguments: argparse.Namespace) -> int:
    """Plans and prints; returns 1 if the program does not fit.

    Raises:
        ValueError, OSError: one line that says what is wrong.
    """
    # The planned devices are compile-only; this process needs only the CPU.
    jax.config.update("jax_platforms", "cpu")
    config = run_config(apply_overrides(load_config_file(arguments.config), arguments.set))
    result = plan(config, arguments.topology, arguments.what, arguments.batch, arguments.slots)
    print(json.dumps(to_json(result), indent=2) if arguments.json else to_text(result))
    return 0 if result.fits else 1


def plan(config: RunConfig, topology_name: str, what: str, batch: int | None = None, slots: int | None = None) -> Plan:
    """Compiles and analyses one program; ``batch`` replaces the config's.

    Raises:
        ValueError: an invalid topology, mesh or batch.
    """
    topology = open_topology(topology_name, config.mesh.slice)
    if batch is not None:
        config = dataclasses.replace(config, batch_size=batch)
    program = build_program(family_of(config.model), config, make_mesh(config.mesh, topology.devices))
    print(
        f"compiling for {len(topology.devices)} devices; a full-size model takes minutes", file=sys.stderr, flush=True
    )
    compiled = compile_step(program) if what == "train" else compile_decode(program, config.batch_size, slots)
    return make_plan(program, topology, compiled, what, config.batch_size)

"""Compiles a run's step for TPUs that are not there, and tells whether it fits and what bounds it.

    python -m magma_jax.plan --config configs/magma_v2.py --topology v5e:4x4 --set mesh.fsdp=16
    python -m magma_jax.plan --config configs/magma_v2.py --topology v6e:2x2 --what generate --batch 64

No weights are read and no TPU is needed, only `pip install magma_jax[plan]`. Exit status: 0 fits, 1 does not fit,
2 unusable input. See docs/plans.md.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

import jax

from magma_jax.config import apply_overrides, load_config_file
from magma_jax.families import family_of, run_config
from magma_jax.output import error_line
from magma_jax.plan.chips import CHIPS, open_topology
from magma_jax.plan.compilation import compile_decode, compile_step
from magma_jax.plan.report import Plan, make_plan, to_json, to_text
from magma_jax.runtime.sharding import make_mesh
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import build_program


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, plans, prints; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m magma_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="as for train.py: a Python program, which is run")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help=f"chips: {', '.join(CHIPS)}")
    parser.add_argument("--what", choices=["train", "generate"], default="train", help="default: %(default)s")
    parser.add_argument("--batch", type=int, help="rows over all devices; default: the config's")
    parser.add_argument("--slots", type=int, help="generate: positions in the cache; default: the context length")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override values of the config")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    # The devices of the plan are no devices of this process, and it needs none but the CPU.
    jax.config.update("jax_platforms", "cpu")
    try:
        config = run_config(apply_overrides(load_config_file(arguments.config), arguments.set))
        result = plan(config, arguments.topology, arguments.what, arguments.batch, arguments.slots)
    except (ValueError, OSError) as error:  # the package's own errors are ValueErrors
        print(f"magma_jax.plan: {error_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(to_json(result), indent=2) if arguments.json else to_text(result))
    return 0 if result.fits else 1


def plan(config: RunConfig, topology_name: str, what: str, batch: int | None = None, slots: int | None = None) -> Plan:
    """Compiles and reads one program; ``batch`` replaces the config's.

    Raises:
        ValueError: a topology, mesh or batch that cannot be.
    """
    topology = open_topology(topology_name)
    if batch is not None:
        config = dataclasses.replace(config, batch_size=batch)
    family = family_of(config.model)
    program = build_program(family, config, make_mesh(config.mesh, topology.devices))
    print(
        f"compiling for {len(topology.devices)} devices; a full-size model takes minutes", file=sys.stderr, flush=True
    )
    if what == "train":
        compiled = compile_step(program)
    else:
        context = family.language_model(config.model).context_length
        compiled = compile_decode(program, config.batch_size, slots or context)
    return make_plan(program, topology, compiled, what, config.batch_size)


if __name__ == "__main__":
    sys.exit(main())

"""Compiles a run's step for a TPU topology, without TPUs, and reports whether it fits and what bounds its speed.

    python -m magma_jax.plan --config configs/magma_v2.py --topology v5e:4x4 --set mesh.fsdp=16
    python -m magma_jax.plan --config configs/magma_v2.py --topology v6e:4x4 --set mesh.slice=4 mesh.fsdp=16
    python -m magma_jax.plan --config configs/magma_v2.py --topology v6e:2x2 --what generate --batch 64

No weights are read and no TPU is needed, only `pip install magma_jax[plan]`. Exit status: 0 fits, 1 does not fit,
2 unusable input. See docs/plans.md.
"""

import argparse
import sys
from collections.abc import Sequence

from magma_jax import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, plans, prints; returns the exit status, see ``commands``."""
    parser = commands.ArgumentParser(
        prog="python -m magma_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="as for train.py: a Python program, which is run")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="of one slice, such as v5e:4x4 (docs/plans.md lists the chips); mesh.slice is the number of slices",
    )
    parser.add_argument("--what", choices=["train", "generate"], default="train", help="default: %(default)s")
    parser.add_argument("--batch", type=int, help="rows over all devices; default: the config's")
    parser.add_argument("--slots", type=int, help="generate: positions in the cache; default: the context length")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override values of the config")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)

    def work() -> int:
        from magma_jax.plan.command import run

        return run(arguments)

    return commands.run("magma_jax.plan", work)


if __name__ == "__main__":
    sys.exit(main())

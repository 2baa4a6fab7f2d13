"""Trains a model from a config; by default the quick start.

    python train.py
    python train.py --config configs/quickstart_lm.py --workdir runs/quickstart_lm --set seed=1 optim.learning_rate=1e-3
    python train.py --show

A run folder with checkpoints of the same config is resumed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from magma_jax import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and evaluates if the config says so; returns the exit status, see ``commands``."""
    parser = commands.ArgumentParser(
        prog="train.py",
        description="Trains a model from a config; by default the quick start.",
        epilog="--show prints every setting and its value in the form that --set takes. RunConfig in "
        "magma_jax/training/run/config.py and the classes that it names say what each one means; docs/training.md "
        "explains the usual ones.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("quickstart"),
        help="a Python program, which is run, or the name of one of configs/; default: %(default)s",
    )
    parser.add_argument(
        "--workdir",
        type=commands.place,
        help="run folder, also gs:// or s3://BUCKET/FOLDER, see docs/storage.md; default: runs/ and the config's name",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help='override values of the config, as in steps=100 optim.groups.encoder=frozen "data.buckets=(8, 16)"',
    )
    parser.add_argument("--show", action="store_true", help="print the resolved config and end")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue the run in the folder, if there is one; --no-resume refuses to (default: --resume)",
    )
    parser.add_argument("--profile-steps", metavar="FIRST:LAST", help="trace these steps for TensorBoard, as in 10:15")
    parser.add_argument("--distributed", action="store_true", help="as one of several processes: docs/training.md")
    arguments = parser.parse_args(argv)
    return commands.run("train.py", lambda: _train(arguments), resumable=arguments.resume)


def _train(arguments: argparse.Namespace) -> int:
    # Imported here: JAX takes seconds to import, and --help does not need it.
    from magma_jax.config import apply_overrides, config_name, load_config_file, settings
    from magma_jax.families import evaluate_run, family_of, run_config
    from magma_jax.output import printable
    from magma_jax.runtime.distributed import distributed_run
    from magma_jax.training.loop import train
    from magma_jax.training.monitor.profiler import StepRange

    workdir = arguments.workdir or Path("runs") / config_name(arguments.config)
    config = run_config(apply_overrides(load_config_file(arguments.config), arguments.set))
    if arguments.show:
        print(printable("\n".join(settings(config))))
        return 0
    profile = StepRange.parse(arguments.profile_steps) if arguments.profile_steps else None
    with distributed_run(arguments.distributed):
        run = train(family_of(config.model), config, workdir, resume=arguments.resume, profile=profile)
    if run.interrupted:
        return commands.STOPPED
    # Evaluation runs in one process.
    if config.evaluate and not arguments.distributed:
        evaluate_run(workdir)
        print(f"\nReport: {workdir}/report.html")
        print(f"An image of your own: python -m magma_jax.generate --checkpoint {workdir} image.png")
    return 0

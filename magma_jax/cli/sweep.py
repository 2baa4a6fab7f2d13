"""Trains one run for every combination of config values, and prints one table of them.

    magma-jax sweep --config own_data --workdir runs/sweep --over optim.learning_rate 1e-3 3e-4 --over seed 0 1
    magma-jax sweep --config own_data --workdir runs/sweep --over seed 0 1 2 --slurm sweep.sh

The same command continues: finished runs are left alone, stopped ones resume. docs/training.md describes it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from magma_jax import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and trains; returns the exit status, see ``commands``."""
    parser = commands.ArgumentParser(
        prog="sweep",
        description="Trains one run for every combination of config values, and prints one table of them.",
    )
    parser.add_argument("--config", type=Path, default=Path("quickstart"), help="as of train; default: %(default)s")
    parser.add_argument(
        "--workdir", type=commands.place, required=True, help="folder of the runs, also gs:// or s3://BUCKET/FOLDER"
    )
    parser.add_argument(
        "--over",
        nargs="+",
        action="append",
        required=True,
        metavar=("KEY", "VALUE"),
        help="a setting and its values; may repeat",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides that all runs share")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time; default: %(default)s")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--only", type=int, metavar="INDEX", help="train this one alone, as a task of a job array does")
    how.add_argument("--slurm", type=Path, metavar="FILE", help="train nothing; write a script for sbatch")
    how.add_argument("--table", action="store_true", help="train nothing; print the table of what there is")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    return commands.run("sweep", lambda: _sweep(arguments), resumable=True)


def _sweep(arguments: argparse.Namespace) -> int:
    # Imported here: JAX takes seconds to import, and --help does not need it.
    from magma_jax.cli.sweep_runs import array_script, planned, show_table, train_all
    from magma_jax.config import ConfigError
    from magma_jax.output import object_address
    from magma_jax.storage.objects.store import Store

    runs = planned(arguments.config, arguments.workdir, arguments.over, arguments.set)
    if (address := object_address(arguments.workdir)) is not None:
        Store(address).check()
    if arguments.slurm is not None:
        if address is None:
            Path(arguments.workdir).mkdir(parents=True, exist_ok=True)
        arguments.slurm.write_text(array_script(arguments, len(runs)))
        print(f"{arguments.slurm}: an array of {len(runs)} tasks for sbatch, which takes the options of your cluster")
        return 0
    if arguments.table:
        show_table(arguments.workdir, runs)
        return 0
    if arguments.only is None:
        status = train_all(runs, arguments.jobs)
        show_table(arguments.workdir, runs)
        return status
    if not 0 <= arguments.only < len(runs):
        raise ConfigError(f"--only must be 0 to {len(runs) - 1}, got {arguments.only}")
    return train_all([runs[arguments.only]], 1)

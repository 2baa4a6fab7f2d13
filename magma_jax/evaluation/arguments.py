"""Options of eval.py for tasks; this module does not import JAX."""

import argparse
from pathlib import Path

from magma_jax import commands
from magma_jax.evaluation.images.task import IMAGE_TASKS
from magma_jax.evaluation.tasks.task import TASKS


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``eval.py --task``."""
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--task", nargs="+", metavar="NAME", choices=[*TASKS, *IMAGE_TASKS], help=", ".join((*TASKS, *IMAGE_TASKS))
    )
    group.add_argument(
        "--checkpoint",
        type=commands.source,
        help="model folder or file, also gs://, s3:// and hf:// addresses; default: the run in --workdir",
    )
    folder = {"nargs": "+", "default": [], "metavar": "[TASK=]FOLDER"}
    group.add_argument("--data", **folder, help="dataset folder; default: the run's own data")
    group.add_argument("--shot-data", **folder, help="dataset folder that shots come from")
    group.add_argument("--shots", type=int, nargs="+", metavar="N", help="default: 0")
    group.add_argument(
        "--sweep", nargs="+", action="append", metavar=("KEY", "VALUE"), help="a setting and its values; may repeat"
    )
    group.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override settings of the tasks")
    group.add_argument(
        "--output",
        type=commands.place,
        help="folder of the results, also gs:// or s3://BUCKET/FOLDER; default: evaluation/ in --workdir",
    )
    group.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    group.add_argument("--workers", type=int, help="processes that decode images; default: one per core")
    group.add_argument("--dtype", help="dtype of weights and activations, such as bfloat16; default: the checkpoint's")
    group.add_argument("--mesh", nargs="*", metavar="KEY=VALUE", help="mesh of devices, as in data=-1")
    group.add_argument("--distributed", action="store_true", help="as one of several processes: docs/training.md")


def add_other_options(parser: argparse.ArgumentParser) -> None:
    """The other options of eval.py."""
    group = parser.add_argument_group("other")
    group.add_argument(
        "--compare",
        nargs="+",
        type=commands.place,
        metavar="RESULT",
        help="two results or more, or runs and folders of results",
    )
    group.add_argument("--html", type=Path, metavar="FILE", help="with --compare: also write a page")
    group.add_argument("--json", action="store_true", help="with --compare, --perplexity or --knowledge: print JSON")
    group.add_argument(
        "--knowledge", action="store_true", help="questions about OpenMoji's drawings that no caption answers (--shots)"
    )
    group.add_argument("--perplexity", type=Path, metavar="FILE", help="of a text file, with and without adapters")

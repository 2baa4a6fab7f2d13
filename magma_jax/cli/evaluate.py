"""Evaluates a run of train.py on a held-out split, or any checkpoint on a task.

    python eval.py
    python eval.py --workdir runs/quickstart --split validation --limit 50
    python eval.py --workdir runs/quickstart --task own_questions own_captions --shots 0 1 2 4
    python eval.py --checkpoint models/magma_long --task vqav2 --data data/vqa_val --shot-data data/vqa_train
    python eval.py --compare runs/a runs/b runs/c --html comparison.html
    python eval.py --workdir runs/quickstart --perplexity text.txt
    python eval.py --workdir runs/smollm2 --knowledge --shots 0 2 4

Without --task it prints the table and writes results.json, predictions.jsonl and report.html into the run folder;
a split other than test, or a limit, is part of their names. docs/evaluation.md describes tasks and their files.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from magma_jax import commands
from magma_jax.evaluation.arguments import add_other_options, add_task_options


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and evaluates; returns the exit status, see ``commands``."""
    parser = commands.ArgumentParser(
        prog="eval.py",
        description="Evaluates a run that train.py made, or any checkpoint on a task.",
        epilog="docs/evaluation.md describes tasks, protocols and files.",
    )
    parser.add_argument(
        "--workdir",
        type=commands.place,
        default=Path("runs/quickstart"),
        help="run folder, also gs:// or s3://BUCKET/FOLDER; default: %(default)s",
    )
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="maximum number of captions and of questions; default: all")
    parser.add_argument("--overview", type=Path, metavar="PNG", help="also draw twelve images with their texts")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="use the moving averages of a run's weights, or the weights; default: as the run was validated",
    )
    add_task_options(parser)
    add_other_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.checkpoint and not (arguments.task or arguments.perplexity):
        parser.error("--checkpoint is asked a --task or for its --perplexity; a run's own split is that of --workdir")
    return commands.run("eval.py", lambda: _evaluate_with_copies(arguments))


def _evaluate_with_copies(arguments: argparse.Namespace) -> None:
    """Evaluates with local copies of what is in object storage, to which new files are uploaded at the end."""
    from magma_jax.storage.objects.copies import local_copy, uploading

    with contextlib.ExitStack() as copies:
        if arguments.compare:
            arguments.compare = [local_copy(result) for result in arguments.compare]
        elif arguments.checkpoint:
            if isinstance(arguments.checkpoint, commands.ObjectAddress):
                arguments.checkpoint = copies.enter_context(uploading(arguments.checkpoint))
        else:
            arguments.workdir = copies.enter_context(uploading(arguments.workdir))
        if arguments.output:
            arguments.output = copies.enter_context(uploading(arguments.output))
        _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    # Imported here: JAX takes seconds to import, and --help does not need it.
    from magma_jax.evaluation.command import run_comparison, run_knowledge, run_perplexity, run_tasks
    from magma_jax.families import evaluate_run, open_generator, open_token_generator
    from magma_jax.runtime.distributed import distributed_run

    if arguments.task:
        with distributed_run(arguments.distributed):
            run_tasks(open_token_generator, open_generator, arguments)
    elif arguments.compare:
        run_comparison(arguments)
    elif arguments.knowledge:
        run_knowledge(open_token_generator, arguments)
    elif arguments.perplexity:
        run_perplexity(open_token_generator, arguments)
    else:
        evaluate_run(
            arguments.workdir,
            arguments.split,
            arguments.limit,
            overview=arguments.overview,
            settings=arguments.set,
            ema=arguments.ema,
        )

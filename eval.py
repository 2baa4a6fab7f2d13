"""Evaluates a run that train.py made, on a split that it did not learn from.

    python eval.py
    python eval.py --workdir runs/quickstart --split validation --limit 50

Prints the table and writes results.json, predictions.jsonl and report.html into the run folder; another split than
test, or a limit, is part of their names.
"""

import argparse
import sys
from pathlib import Path

from magma_jax.evaluation.own_split import evaluate_run


def main() -> None:
    """Reads the command line and evaluates."""
    parser = argparse.ArgumentParser(description="Evaluates a run that train.py made.")
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="at most this many captions and this many questions; default: all")
    parser.add_argument("--overview", type=Path, metavar="PNG", help="also draw twelve pictures with their texts")
    arguments = parser.parse_args()
    try:
        evaluate_run(arguments.workdir, arguments.split, arguments.limit, arguments.overview)
    except (ValueError, OSError) as error:  # the package's own errors are ValueErrors
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()

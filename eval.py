"""Evaluates a run that train.py made: its newest checkpoint, on a split that it did not learn from.

    python eval.py
    python eval.py --workdir runs/quickstart --split validation --limit 50

Prints the table and writes results.json, predictions.jsonl and report.html into the run folder; another split than
test, or a limit, is part of their names.
"""

import sys

from absl import app, flags

from magma_jax.config import ConfigError
from magma_jax.evaluation.tasks import EvaluationError, evaluate_run
from magma_jax.training.checkpoint import CheckpointError

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Run folder.")
SPLIT = flags.DEFINE_string("split", "test", "Split of the run's data set.")
LIMIT = flags.DEFINE_integer("limit", None, "At most this many captions and this many questions; default: all.")
OVERVIEW = flags.DEFINE_string("overview", None, "PNG file to draw twelve pictures with their texts to.")


def main(argv: list[str]) -> None:
    """Reads flags, evaluates."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        evaluate_run(WORKDIR.value, SPLIT.value, LIMIT.value, OVERVIEW.value)
    except (CheckpointError, ConfigError, EvaluationError) as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    app.run(main)

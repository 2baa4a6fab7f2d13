"""Scores prediction files in the official formats, without a model.

python -m magma_jax.evaluation score --protocol vqa_official --references v2_mscoco_val2014_annotations.json \\
    --predictions results.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from magma_jax import commands
from magma_jax.evaluation.metrics.bootstrap import DRAWS
from magma_jax.evaluation.scoring.protocols import PROTOCOLS
from magma_jax.output import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and scores; returns the exit status, see ``commands``."""
    parser = commands.ArgumentParser(prog="python -m magma_jax.evaluation", description=str(__doc__).splitlines()[0])
    subparsers = parser.add_subparsers(dest="command", required=True)
    one = subparsers.add_parser("score", help="score a file of predictions", description="Scores a prediction file.")
    one.add_argument("--protocol", required=True, choices=PROTOCOLS, metavar="NAME", help=", ".join(PROTOCOLS))
    one.add_argument(
        "--references",
        required=True,
        type=Path,
        help="the official annotation file; for GQA also a folder of chunks",
    )
    one.add_argument("--predictions", required=True, type=Path, help="list of predictions, .json or .jsonl")
    one.add_argument("--choices", type=Path, help="GQA's file of choices, for its validity and plausibility")
    one.add_argument("--draws", type=int, default=DRAWS, help="bootstrap draws; default: %(default)s")
    one.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)

    def work() -> None:
        from magma_jax.evaluation.scoring.score import score_files

        if arguments.draws < 1:
            raise ValueError(f"--draws must be at least 1, got {arguments.draws}")
        files = arguments.references, arguments.predictions
        result = score_files(arguments.protocol, *files, choices=arguments.choices, draws=arguments.draws)
        shown = json.dumps(result.to_dict(), indent=2, ensure_ascii=False) if arguments.json else result.table()
        print(printable(shown))

    return commands.run("magma_jax.evaluation", work)


if __name__ == "__main__":
    sys.exit(main())

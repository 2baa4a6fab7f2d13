"""Memory banks of documents, and what is retrieved from them.

python -m magma_jax.retrieval build data/bank --data openmoji
python -m magma_jax.retrieval annotate data/bank data/retrieved --data openmoji
python -m magma_jax.retrieval search data/bank "a woman firefighter with dark skin tone"
python -m magma_jax.retrieval fit data/projection.safetensors --data openmoji
python -m magma_jax.retrieval recall --data openmoji --encoder minilm --weights data/projection.safetensors
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from magma_jax import commands

# Weight of the penalty of ``fit``.
RIDGE = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status, see ``commands``."""
    arguments = _parser().parse_args(argv)

    def work() -> int:
        from magma_jax.retrieval.command import RUN

        return RUN[arguments.command](arguments)

    return commands.run("magma_jax.retrieval", work, resumable=arguments.command in ("build", "annotate"))


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser(
        prog="python -m magma_jax.retrieval", description="Memory banks of documents, and what is retrieved from them."
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    one = subparsers.add_parser("build", help="encode documents and write a memory bank")
    one.add_argument("out", type=Path, help="folder to write; an interrupted build continues there")
    _add_data(one)
    one.add_argument("--codes", help="folder of data encode with the codes of the same images, to train with")
    one.add_argument("--splits", default="train", help="splits to include, by commas; default: %(default)s")
    two = subparsers.add_parser("annotate", help="retrieve documents for every sample of a data set")
    two.add_argument("bank", type=Path, help="folder of build")
    two.add_argument("out", type=Path, help="folder to write; an interrupted annotation continues there")
    _add_data(two)
    two.add_argument(
        "--splits", default="train,validation,test", help="splits to annotate, by commas; default: %(default)s"
    )
    two.add_argument("--documents", type=int, default=2, help="documents by text, and by image; default: %(default)s")
    two.add_argument("--candidates", type=int, default=128, help="documents to choose from; default: %(default)s")
    two.add_argument(
        "--by-image", default="train", help="splits whose images are queries too, by commas; default: %(default)s"
    )
    two.add_argument("--images-only", action="store_true", help="search by no text; all splits are those of --by-image")
    two.add_argument("--max-similarity", type=float, default=0.9, help="largest cosine; default: %(default)s")
    two.add_argument("--dropout", type=float, default=0.2, help="share of words left out; default: %(default)s")
    two.add_argument(
        "--decay",
        type=float,
        default=1.0,
        help="weight of what an earlier document of the text has already; default: %(default)s",
    )
    two.add_argument("--seed", type=int, default=0, help="of the dropout; default: %(default)s")
    three = subparsers.add_parser("search", help="print the best documents of a text or an image")
    three.add_argument("bank", type=Path, help="folder of build")
    three.add_argument("text", nargs="*", help="texts to search by")
    three.add_argument("--image", type=Path, action="append", default=[], help="image file to search by")
    three.add_argument("-k", type=int, default=5, help="documents to print; default: %(default)s")
    four = subparsers.add_parser("fit", help="fit the projection of the encoder minilm to pairs of text and image")
    four.add_argument("out", type=Path, help="file to write, .safetensors")
    _add_data(four, bank=False)
    four.add_argument("--splits", default="train", help="splits to fit to, by commas; default: %(default)s")
    four.add_argument("--ridge", type=float, default=RIDGE, help="weight of the penalty; default: %(default)s")
    five = subparsers.add_parser("recall", help="how often a text finds its own image among those of a split")
    _add_data(five, bank=False)
    five.add_argument("--splits", default="test", help="splits of the pairs, by commas; default: %(default)s")
    five.add_argument("-k", type=int, default=2, help="images, or texts, that are found; default: %(default)s")
    for command in (one, two, three, five):
        command.add_argument("--encoder", default="hashed", help="encoder of texts and images; default: %(default)s")
        command.add_argument("--weights", help="file of the encoder's weights, if it needs one")
    for command in (two, three):
        command.add_argument(
            "--method", choices=("exact", "approx", "faiss"), default="exact", help="default: %(default)s"
        )
        command.add_argument("--recall", action="store_true", help="compare with the exact search and print the recall")
    return parser


def _add_data(command: argparse.ArgumentParser, *, bank: bool = True) -> None:
    command.add_argument("--data", required=True, help="openmoji, or a dataset folder with captions")
    command.add_argument("--split", default="train", help="split that a dataset folder holds; default: %(default)s")
    command.add_argument("--cache-dir", default="~/.cache/magma_jax", help="of openmoji; default: %(default)s")
    if bank:
        command.add_argument(
            "--with-evaluation", action="store_true", help="allow a bank with items of a split other than train"
        )


if __name__ == "__main__":
    sys.exit(main())

"""Converts datasets from their released formats to the library's own, encodes images, trains tokenizers, lists answers.

python -m magma_jax.data convert --from coco captions_val2014.json data/coco_val --images val2014
python -m magma_jax.data convert --from vqav2 v2_OpenEnded_mscoco_val2014_questions.json data/vqa --images val2014
python -m magma_jax.data convert --from folder my_images data/mine
python -m magma_jax.data convert --from table my.jsonl data/mine --split train=0.9 validation=0.05 test=0.05
python -m magma_jax.data encode data/mine data/mine_codes --tokenizer runs/vqgan_quickstart
python -m magma_jax.data show data/mine
python -m magma_jax.data tokenizer captions.txt tokenizer.json --vocab-size 56320
python -m magma_jax.data answers data/vqa_train data/vqa_answers.json --count 3129
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from magma_jax import commands
from magma_jax.data.images import MAX_PIXELS
from magma_jax.data.readers import READERS
from magma_jax.data.write.conversion import ConvertOptions
from magma_jax.data.write.prepare import Check, Fingerprint


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status, see ``commands``."""
    parser = commands.ArgumentParser(prog="python -m magma_jax.data", description=str(__doc__).splitlines()[0])
    subparsers = parser.add_subparsers(dest="command", required=True)
    one = subparsers.add_parser("convert", help="write a dataset folder", description="Writes a dataset folder.")
    one.add_argument("source", type=Path, help="annotation file, or the folder for formats that hold their images")
    one.add_argument("out", type=Path, help="folder to write")
    one.add_argument("--from", dest="format", required=True, choices=READERS, metavar="FORMAT", help=", ".join(READERS))
    one.add_argument("--images", type=Path, help="folder with the images, at any depth")
    one.add_argument("--option", nargs="*", default=[], metavar="KEY=VALUE", help="options of the format")
    one.add_argument(
        "--split",
        nargs="+",
        metavar="NAME=SHARE",
        help="write OUT/NAME for every split, as train=0.9 validation=0.05 test=0.05; copies of an image stay together",
    )
    one.add_argument("--shard-records", type=int, default=ConvertOptions.shard_records, help="default: %(default)s")
    one.add_argument("--workers", type=int, help="worker processes, 0 to run in this process; default: one per core")
    one.add_argument("--check", choices=get_args(Check), default="decode", help="default: %(default)s")
    one.add_argument(
        "--duplicates",
        choices=get_args(Fingerprint),
        default="none",
        help="skip duplicates by bytes (content) or difference hash (perceptual)",
    )
    one.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="default: %(default)s")
    one.add_argument(
        "--max-skipped", type=float, default=ConvertOptions.max_skipped, help="largest fraction; default: %(default)s"
    )
    one.add_argument("--runner", choices=("local", "beam"), default="local", help="beam: as an Apache Beam pipeline")
    one.add_argument(
        "--beam", nargs="*", default=[], metavar="KEY=VALUE", help="options of Beam, as runner=FlinkRunner"
    )
    two = subparsers.add_parser("show", help="print the content of a dataset folder")
    two.add_argument("folder", type=Path)
    two.add_argument("--limit", type=int, default=3, help="records to print; default: %(default)s")
    three = subparsers.add_parser(
        "tokenizer",
        help="train a byte-level BPE tokenizer on text files",
        description="Trains a byte-level BPE tokenizer on the lines of UTF-8 text files.",
    )
    three.add_argument("files", type=Path, nargs="+", metavar="FILE", help="text files, a text on every line")
    three.add_argument("out", type=Path, help="tokenizer.json to write")
    # CM3Leon (Yu et al. 2023), section 2.1.
    three.add_argument("--vocab-size", type=int, default=56_320, help="entries; default: %(default)s")
    four = subparsers.add_parser(
        "encode",
        help="write the codes of a dataset folder's images",
        description="Writes the codes of a dataset folder's images, by an image tokenizer, and their texts.",
    )
    four.add_argument("dataset", type=Path, help="dataset folder with images")
    four.add_argument("out", type=Path, help="folder to write")
    four.add_argument("--tokenizer", required=True, help="VQ-GAN: run folder, model folder, file or hf:// address")
    four.add_argument("--crops", type=int, default=0, help="random crops beside the centre; default: %(default)s")
    four.add_argument("--flips", action="store_true", help="also every view mirrored")
    four.add_argument("--shard-records", type=int, default=1024, help="default: %(default)s")
    four.add_argument("--batch-size", type=int, default=64, help="images at a time; default: %(default)s")
    four.add_argument("--workers", type=int, help="decoding processes, 0 for this process; default: one per core")
    four.add_argument("--max-skipped", type=float, default=0.05, help="largest fraction; default: %(default)s")
    five = subparsers.add_parser(
        "answers",
        help="write the commonest answers of a dataset folder",
        description="Writes the commonest answers of a dataset folder, the classes of a classifier, as a JSON array.",
    )
    five.add_argument("folder", type=Path, help="dataset folder with questions")
    five.add_argument("out", type=Path, help="JSON file to write")
    # As is usual for VQAv2: those that at least nine of its training questions have.
    five.add_argument("--count", type=int, default=3129, help="answers; default: %(default)s")
    arguments = parser.parse_args(argv)
    resumable = arguments.command in ("convert", "encode")
    return commands.run("magma_jax.data", lambda: _run(arguments), resumable=resumable)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command != "encode":
        from magma_jax.data.command import run

        run(arguments)
        return
    from magma_jax.data.write.encoding import EncodeOptions, encode_folder
    from magma_jax.families import open_image_encoder
    from magma_jax.output import printable

    options = EncodeOptions(
        crops=arguments.crops,
        flips=arguments.flips,
        shard_records=arguments.shard_records,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        max_skipped=arguments.max_skipped,
    )
    encoder = open_image_encoder(arguments.tokenizer)
    info = encode_folder(arguments.dataset, arguments.out, encoder, options)
    print(f"{arguments.out}: {info['records']} records, {info['views']} x {info['tokens']} codes each")
    for reason, count in info["skipped"].items():
        print(printable(f"samples left out: {count} x {reason}"))


if __name__ == "__main__":
    sys.exit(main())

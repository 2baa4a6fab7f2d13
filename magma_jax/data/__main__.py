"""Datasets in their released formats, to the library's own.

python -m magma_jax.data convert --from coco captions_val2014.json data/coco_val --images val2014
python -m magma_jax.data convert --from vqav2 v2_OpenEnded_mscoco_val2014_questions.json data/vqa --images val2014
python -m magma_jax.data convert --from folder my_images data/mine
python -m magma_jax.data show data/mine
"""

import argparse
import functools
import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args

from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import EXPECTED, DataError
from magma_jax.data.images import MAX_PIXELS
from magma_jax.data.readers import READERS, SELF_CONTAINED, read
from magma_jax.data.write.beam import convert_with_beam
from magma_jax.data.write.conversion import ConvertOptions, convert
from magma_jax.data.write.prepare import Check, Fingerprint, PrepareOptions
from magma_jax.output import error_line, printable


def main() -> None:
    """Reads the command line and converts or shows."""
    parser = argparse.ArgumentParser(prog="python -m magma_jax.data", description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("convert", help="write a dataset folder", description="Writes a dataset folder.")
    one.add_argument("source", type=Path, help="annotation file, or the folder for formats that hold their images")
    one.add_argument("out", type=Path, help="folder to write")
    one.add_argument("--from", dest="format", required=True, choices=READERS, metavar="FORMAT", help=", ".join(READERS))
    one.add_argument("--images", type=Path, help="folder below which the images lie")
    one.add_argument("--option", nargs="*", default=[], metavar="KEY=VALUE", help="options of the format")
    one.add_argument("--shard-records", type=int, default=ConvertOptions.shard_records, help="default: %(default)s")
    one.add_argument("--workers", type=int, help="processes, 0 for none beside this one; default: one a core")
    one.add_argument("--check", choices=get_args(Check), default="decode", help="default: %(default)s")
    one.add_argument("--duplicates", choices=get_args(Fingerprint), default="none", help="leave out duplicates by")
    one.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="default: %(default)s")
    one.add_argument(
        "--max-skipped", type=float, default=ConvertOptions.max_skipped, help="share; default: %(default)s"
    )
    one.add_argument("--runner", choices=("local", "beam"), default="local", help="beam: as an Apache Beam pipeline")
    one.add_argument(
        "--beam", nargs="*", default=[], metavar="KEY=VALUE", help="options of Beam, as runner=FlinkRunner"
    )
    two = commands.add_parser("show", help="print what a dataset folder holds")
    two.add_argument("folder", type=Path)
    two.add_argument("--limit", type=int, default=3, help="records to print; default: %(default)s")
    arguments = parser.parse_args()
    try:
        _convert(arguments) if arguments.command == "convert" else _show(arguments)
    except (ValueError, OSError) as error:  # the package's own errors are ValueErrors
        sys.exit(f"magma_jax.data: {error_line(error)}")
    except KeyboardInterrupt:
        sys.exit("magma_jax.data: interrupted; run the same command again to go on")


def _convert(arguments: argparse.Namespace) -> None:
    options = _options(arguments.format, arguments.option)
    if arguments.images is None and arguments.format not in SELF_CONTAINED:
        raise DataError(f"--from {arguments.format} needs --images, the folder of the images")
    entries = functools.partial(read, arguments.format, arguments.source, arguments.images, **options)
    how = ConvertOptions(
        PrepareOptions(arguments.check, arguments.max_pixels, arguments.duplicates),
        arguments.shard_records,
        arguments.workers,
        arguments.max_skipped,
    )
    source = {"format": arguments.format, "file": arguments.source.name, **options}
    if arguments.runner == "beam":
        info = convert_with_beam(entries, arguments.out, how, source=source, beam_options=arguments.beam)
    else:
        info = convert(entries(), arguments.out, how, source=source)
    print(f"{arguments.out}: {info['records']} records, {info['captions']} captions, {info['questions']} questions")
    for reason, count in info["skipped"].items():
        remark = " (expected: not counted against --max-skipped)" if reason in EXPECTED else ""
        print(printable(f"samples left out: {count} x {reason}{remark}"))


def _options(name: str, pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` strings as keyword arguments of the format's reader."""
    parameters = inspect.signature(READERS[name]).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            raise DataError(f"--option {pair}: expected KEY=VALUE; {name} has: {', '.join(known) or 'no options'}")
        if isinstance(known[key], bool):
            if value.lower() not in ("true", "false"):
                raise DataError(f"--option {pair}: expected true or false")
            options[key] = value.lower() == "true"
        elif isinstance(known[key], int):
            if not value.isdecimal() or not int(value):
                raise DataError(f"--option {pair}: expected a whole number above 0")
            options[key] = int(value)
        else:
            options[key] = value
    return options


def _show(arguments: argparse.Namespace) -> None:
    if arguments.limit < 0:
        raise DataError(f"--limit must be 0 or more, got {arguments.limit}")
    records = StoredRecords(arguments.folder)
    print(printable(json.dumps(records.info, indent=2, ensure_ascii=False)))
    for row in range(min(arguments.limit, len(records))):
        record = records[row]
        print(printable(f"\n{record.id}  ({len(record.image_bytes())} bytes)"))
        for caption in record.captions:
            print(printable(f"  {caption}"))
        for question in record.questions:
            print(printable(f"  {question.text}  {', '.join(dict.fromkeys(question.answers))}"))


if __name__ == "__main__":
    main()

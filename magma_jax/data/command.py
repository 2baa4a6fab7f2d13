"""Subcommands of ``python -m magma_jax.data``."""

import argparse
import functools
import inspect
import json
from pathlib import Path
from typing import Any

from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import EXPECTED, DataError
from magma_jax.data.readers import READERS, SELF_CONTAINED, read
from magma_jax.data.tokenizers.training import train_tokenizer
from magma_jax.data.write.answers import write_answers
from magma_jax.data.write.beam import convert_with_beam
from magma_jax.data.write.conversion import ConvertOptions, convert
from magma_jax.data.write.prepare import PrepareOptions
from magma_jax.data.write.splits import convert_splits, parse_split
from magma_jax.output import printable


def run(arguments: argparse.Namespace) -> None:
    """Converts a dataset, shows the content of a folder, trains a tokenizer, or lists answers.

    Raises:
        ValueError, OSError: one-line errors.
    """
    {"convert": _convert, "show": _show, "tokenizer": _tokenizer, "answers": _answers}[arguments.command](arguments)


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
    if arguments.split:
        if arguments.runner == "beam":
            raise DataError("--split is not for --runner beam; convert every split of such a dataset by itself")
        infos = convert_splits(entries, arguments.out, parse_split(arguments.split), how, source=source)
        for name, info in infos.items():
            _tell(arguments.out / name, info)
    elif arguments.runner == "beam":
        _tell(arguments.out, convert_with_beam(entries, arguments.out, how, source=source, beam_options=arguments.beam))
    else:
        _tell(arguments.out, convert(entries(), arguments.out, how, source=source))


def _tell(out: Path, info: dict[str, Any]) -> None:
    print(f"{out}: {info['records']} records, {info['captions']} captions, {info['questions']} questions")
    for reason, count in info["skipped"].items():
        remark = " (expected: not counted against --max-skipped)" if reason in EXPECTED else ""
        print(printable(f"samples left out: {count} x {reason}{remark}"))


def _options(name: str, pairs: list[str]) -> dict[str, Any]:
    """Parses ``KEY=VALUE`` strings into keyword arguments of the format's reader."""
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


def _tokenizer(arguments: argparse.Namespace) -> None:
    tokenizer = train_tokenizer(arguments.files, arguments.out, arguments.vocab_size)
    print(printable(f"{arguments.out}: {len(tokenizer)} entries, the longest of {tokenizer.longest} bytes"))


def _answers(arguments: argparse.Namespace) -> None:
    answers = write_answers(arguments.folder, arguments.out, arguments.count)
    print(printable(f"{arguments.out}: {len(answers)} answers, the commonest: {', '.join(answers[:5])}"))

"""Work folder of a conversion: shards, each with a report, that a resumed run may reuse.

    WORK/data/     the shards, as in the final folder
    WORK/state/    their reports, and temporary files

A report exists only while it describes its shard.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from magma_jax.data.format.records import DataError, FileSlice, Record, Skipped, pack_text, unpack
from magma_jax.data.format.shards import records_name, shard_writer, texts_name
from magma_jax.data.write.prepare import UNREADABLE, PrepareOptions, prepare
from magma_jax.output import OutputError, full_disk, replace_file

REPORT = "shard-{}.json"


def written_shard(
    work: Path, number: int, chunk: Sequence[Record | Skipped], options: PrepareOptions
) -> dict[str, Any]:
    """Returns the report of a shard, writing the shard unless an earlier run finished it."""
    digest = _digest(chunk)
    return _finished(work, number, digest) or write_shard(work, number, chunk, options, digest)


def write_shard(
    work: Path, number: int, chunk: Sequence[Record | Skipped], options: PrepareOptions, digest: str
) -> dict[str, Any]:
    """Writes one shard and its report, each atomically."""
    skipped, texts, ids, prints = [], [], [], []
    path = shard_path(work, number)
    with writing(path):
        report_path(work, number).unlink(missing_ok=True)
        with shard_writer(path, work / "state") as writer:
            for entry in chunk:
                result = entry if isinstance(entry, Skipped) else prepare(entry, options)
                if isinstance(result, Skipped):
                    skipped.append([result.id, result.reason, result.samples, result.detail])
                    continue
                assert isinstance(entry, Record)  # only records have content
                content, fingerprint = result
                writer.write(content, pack_text(entry))
                ids.append(entry.id)
                prints.append(fingerprint)
                texts.append([len(entry.captions), len(entry.questions)])
        report = {"digest": digest, "input": len(chunk), "ids": ids, "texts": texts, "skipped": skipped}
        report["fingerprints"] = prints if options.duplicates != "none" else []
        replace_file(report_path(work, number), to_json(report))
    return report


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Converts errors of writing to a DataError with the path; errors of reading images do not reach it."""
    try:
        yield
    except (OSError, OutputError) as error:
        full = full_disk(error)
        what, remedy = ("the disk is full", "make room") if full else ("cannot be written", "repair that")
        # The file library's message for a full disk takes several lines.
        reason = os.strerror(full) if full else error
        raise DataError(f"{path}: {what} ({reason}); {remedy} and run the same command again") from None


def read_report(work: Path, number: int) -> dict[str, Any]:
    """Reads the report of a finished shard."""
    return json.loads(report_path(work, number).read_text())


def remove_records(work: Path, number: int, drop: set[str]) -> None:
    """Rewrites a shard without the records in ``drop`` and deletes its report."""
    report_path(work, number).unlink(missing_ok=True)
    path = shard_path(work, number)
    reader = ArrayRecordReader(str(path))
    contents = reader.read_all()
    reader.close()
    with shard_writer(path, work / "state") as writer:
        for content in contents:
            record = unpack(content)
            if record.id not in drop:
                writer.write(content, pack_text(record))


def _finished(work: Path, number: int, digest: str) -> dict[str, Any] | None:
    """Report of a shard that an earlier run finished from the same records; None if there is none."""
    file = report_path(work, number)
    path = shard_path(work, number)
    if not all(part.is_file() for part in (file, path, path.with_name(texts_name(path.name)))):
        return None
    report = read_report(work, number)
    again = report["digest"] != digest or any(reason == UNREADABLE for _, reason, *_ in report["skipped"])
    return None if again else report


def _digest(chunk: Sequence[Record | Skipped]) -> str:
    """Digest of ids, texts and images; for images in files, of the file's path, size and modification time."""
    described = hashlib.sha256()
    state_of = functools.cache(_file_state)  # an archive may hold many images
    for entry in chunk:
        state = None
        if isinstance(entry, Record) and isinstance(entry.image, bytes):
            entry = dataclasses.replace(entry, image=hashlib.sha256(entry.image).digest())
        elif isinstance(entry, Record) and isinstance(entry.image, FileSlice):
            state = state_of(entry.image.path)
        described.update(repr((entry, state)).encode())
    return described.hexdigest()


def _file_state(path: str) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def shard_path(work: Path, number: int) -> Path:
    """Path of a shard's records file."""
    return work / "data" / records_name(number)


def report_path(work: Path, number: int) -> Path:
    """Path of a shard's report."""
    return work / "state" / REPORT.format(f"{number:05d}")


def to_json(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8; lone surrogates, which UTF-8 cannot encode, become JSON escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")

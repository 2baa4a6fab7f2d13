"""Records to sharded ArrayRecord files: in parallel, resumable, and whole or not there.

    OUT/info.json                     what it holds and where it came from; written last
    OUT/records-00000.array_record    records as ``data.records.pack`` gives them
    OUT/texts-00000.array_record      the same without pictures, ``data.records.pack_text``
    OUT/texts.npy                     number of captions and questions of every record, int32 (N, 2)
    OUT/skipped.jsonl                 what was left out, and why

Until then everything lies in ``.OUT.partial/``. The input is cut into shards by position, so a shard depends on its
records alone: an interrupted conversion is run again with the same command, skips the shards that are finished, and
ends with the same files as one that was never interrupted. Pictures are copied, never moved or changed.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from magma_jax.data.prepare import PrepareOptions, prepare
from magma_jax.data.records import DataError, Record, Skipped, pack_text, unpack
from magma_jax.data.shards import INFO_FILE, SKIPPED_FILE, TEXTS_FILE, records_name, shard_writer, texts_name
from magma_jax.data.workers import cores, worker_pool
from magma_jax.output import locked, partial_name, replace_file
from magma_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """How a conversion runs.

    Attributes:
        prepare: how pictures are checked.
        shard_records: records a file.
        workers: processes; None for one a core, 0 for none but this one.
        max_skipped: the largest share of the input that may be left out; above it the conversion fails, with
            nothing lost: run again with a larger share, it only has to finish.
    """

    prepare: PrepareOptions = PrepareOptions()
    shard_records: int = 1024
    workers: int | None = None
    max_skipped: float = 0.05


def convert(
    records: Iterable[Record | Skipped],
    out: str | Path,
    options: ConvertOptions = ConvertOptions(),
    *,
    source: Mapping[str, Any] | None = None,
    total: int | None = None,
) -> dict[str, Any]:
    """Writes a data set folder from any iterable of records and returns the content of its ``info.json``.

    Args:
        records: gives the same records in the same order when an interrupted conversion is run again. Entries that
            are ``Skipped`` go to the report.
        out: the folder to be.
        options: see ``ConvertOptions``.
        source: kept in ``info.json``: where the records come from.
        total: number of records, for the progress bar.

    Raises:
        DataError: ``out`` exists; two records have one id; too much was skipped; the records are not those of the
            interrupted conversion; the disk is full.
        OutputError: another conversion to ``out`` is running.
    """
    return write_folder(
        Path(out), options, dict(source or {}), lambda work: _write_shards(records, work, options, total)
    )


def write_folder(
    out: Path,
    options: ConvertOptions,
    source: Mapping[str, Any],
    write_shards: Callable[[Path], list[dict[str, Any]]],
) -> dict[str, Any]:
    """Makes a data set folder of what ``write_shards`` writes; arguments and errors as of ``convert``.

    Args:
        out: the folder to be.
        options: see ``ConvertOptions``.
        source: kept in ``info.json``.
        write_shards: brings every shard into being, in a folder of its own beside ``out``, and returns their reports
            (``written_shard``) in order.
    """
    if out.exists():
        raise DataError(f"{out}: already exists; choose another name or remove it first")
    work = partial_name(out)
    (work / "state").mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    with locked(out.absolute()):
        _check_same(work / "state" / "options.json", _identity(options), out)
        info = _finish(work, write_shards(work), options, source)
        os.rename(work / "data", out)
    shutil.rmtree(work)
    return info


def _write_shards(
    records: Iterable[Record | Skipped], work: Path, options: ConvertOptions, total: int | None
) -> list[dict[str, Any]]:
    """Brings every shard into being, those apart that a former run finished; returns their reports in order."""
    workers = cores() if options.workers is None else options.workers
    reports: list[dict[str, Any]] = []
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()

    def collect() -> None:
        reports.append(waiting.popleft().result())
        bar.update(reports[-1]["input"])
        bar.set_postfix_str(f"{sum(len(report['skipped']) for report in reports)} skipped")

    bar = tqdm(desc="converting", unit="record", total=total, disable=None)
    with bar, _executor(workers) as submit:
        for number, chunk in enumerate(chunks(records, options.shard_records)):
            if len(waiting) >= 2 * workers > 0:
                collect()
            waiting.append(submit(written_shard, work, number, chunk, options.prepare))
            if not workers:
                collect()
        while waiting:
            collect()
    return reports


@contextlib.contextmanager
def _executor(workers: int) -> Iterator[Callable[..., concurrent.futures.Future]]:
    """``submit`` of a pool of processes, or a call on the spot where there are none."""
    if not workers:
        yield lambda function, *arguments: _done(function(*arguments))
        return
    pool = worker_pool(workers)
    try:
        yield pool.submit
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker process died, perhaps for lack of memory; run again to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _done(value: Any) -> concurrent.futures.Future:
    future: concurrent.futures.Future = concurrent.futures.Future()
    future.set_result(value)
    return future


def chunks(records: Iterable[Record | Skipped], size: int) -> Iterator[list[Record | Skipped]]:
    """Cuts the input into shards; ids are checked on the way, as eight bytes each."""
    seen: set[bytes] = set()
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, size)):
        for entry in chunk:
            if isinstance(entry, Record):
                key = hashlib.blake2b(entry.id.encode(), digest_size=8).digest()
                if key in seen:
                    raise DataError(f"two records have the id {entry.id!r}; ids must be unique")
                seen.add(key)
        yield chunk


def written_shard(
    work: Path, number: int, chunk: Sequence[Record | Skipped], options: PrepareOptions
) -> dict[str, Any]:
    """The report of a shard, which is written unless a former run has finished it."""
    return _finished(work, number, chunk) or _write_shard(work, number, chunk, options)


def read_report(work: Path, number: int) -> dict[str, Any]:
    """The report of a shard that is written."""
    return json.loads(_report_path(work, number).read_text())


def _write_shard(work: Path, number: int, chunk: Sequence[Record | Skipped], options: PrepareOptions) -> dict[str, Any]:
    """Writes one shard and its report, each under a temporary name first."""
    skipped, texts, ids, prints = [], [], [], []
    path = _shard_path(work, number)
    try:
        with shard_writer(path, work / "state") as writer:
            for entry in chunk:
                result = entry if isinstance(entry, Skipped) else prepare(entry, options)
                if isinstance(result, Skipped):
                    skipped.append([result.id, result.reason])
                    continue
                content, fingerprint = result
                writer.write(content, pack_text(entry))
                ids.append(entry.id)
                prints.append(fingerprint)
                texts.append([len(entry.captions), len(entry.questions)])
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); make room and run the same command again") from None
    report = {"digest": _digest(chunk), "input": len(chunk), "ids": ids, "texts": texts, "skipped": skipped}
    report["fingerprints"] = prints if options.duplicates != "none" else []
    _write_json(_report_path(work, number), report)
    return report


def _finish(
    work: Path, reports: list[dict[str, Any]], options: ConvertOptions, source: Mapping[str, Any]
) -> dict[str, Any]:
    """Leaves out duplicates, checks the share of what was skipped, and writes the files beside the shards."""
    if options.prepare.duplicates != "none":
        reports = [_without_duplicates(work, n, r, first) for (n, r), first in _first_seen(reports)]
    skipped = [entry for report in reports for entry in report["skipped"]]
    reasons = dict(collections.Counter(reason for _, reason in skipped).most_common())
    texts = np.array([row for report in reports for row in report["texts"]], np.int32).reshape(-1, 2)
    total = len(texts) + len(skipped)
    duplicates = reasons.get("duplicate", 0)
    if len(skipped) - duplicates > options.max_skipped * total or not len(texts):
        counted = ", ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "there was nothing to read"
        raise DataError(
            f"{len(skipped)} of {total} records would be left out ({counted}), more than max_skipped "
            f"{options.max_skipped:.0%}; repair the source, or run again with a larger share"
        )
    lines = (json.dumps({"id": key, "reason": reason}, ensure_ascii=False) + "\n" for key, reason in skipped)
    (work / "data" / SKIPPED_FILE).write_text("".join(lines))
    np.save(work / "data" / TEXTS_FILE, texts)
    info = {
        "format": "magma_jax records",
        "magma_jax": __version__,
        "source": source,
        "records": len(texts),
        "captions": int(texts[:, 0].sum()),
        "questions": int(texts[:, 1].sum()),
        "skipped": reasons,
        "files": {_shard_path(work, n).name: len(report["ids"]) for n, report in enumerate(reports)},
    }
    # Written in place: the folder gets its name when it is whole, and nothing may be left beside its files.
    (work / "data" / INFO_FILE).write_text(json.dumps(info, ensure_ascii=False, indent=2))
    return info


def _first_seen(reports: list[dict[str, Any]]) -> Iterator[tuple[tuple[int, dict[str, Any]], set[str]]]:
    """For every shard the ids to leave out: those whose fingerprint an earlier record of any shard has."""
    seen: set[str] = set()
    for number, report in enumerate(reports):
        drop = set()
        for key, fingerprint in zip(report["ids"], report["fingerprints"], strict=True):
            if fingerprint in seen:
                drop.add(key)
            seen.add(fingerprint)
        yield (number, report), drop


def _without_duplicates(work: Path, number: int, report: dict[str, Any], drop: set[str]) -> dict[str, Any]:
    """Rewrites a shard without the records in ``drop``; doing it twice changes nothing."""
    kept = [i for i, key in enumerate(report["ids"]) if key not in drop]
    if drop:
        path = _shard_path(work, number)
        reader = ArrayRecordReader(str(path))
        contents = reader.read_all()
        reader.close()
        with shard_writer(path, work / "state") as writer:
            for content in contents:
                record = unpack(content)
                if record.id not in drop:
                    writer.write(content, pack_text(record))
    skipped = report["skipped"] + [[key, "duplicate"] for key in report["ids"] if key in drop]
    return report | {
        "ids": [report["ids"][i] for i in kept],
        "texts": [report["texts"][i] for i in kept],
        "skipped": skipped,
    }


def _finished(work: Path, number: int, chunk: Sequence[Record | Skipped]) -> dict[str, Any] | None:
    """The report of a shard that a former run finished; None if there is none."""
    file = _report_path(work, number)
    path = _shard_path(work, number)
    if not all(part.is_file() for part in (file, path, path.with_name(texts_name(path.name)))):
        return None
    report = json.loads(file.read_text())
    if report["digest"] != _digest(chunk):
        raise DataError(
            f"{work}: the records of shard {number} are not those of the interrupted conversion; "
            "restore the source, or remove this folder to begin again"
        )
    return report


def _digest(chunk: Sequence[Record | Skipped]) -> str:
    """Of everything but the pictures: ids, texts, and where the pictures lie."""
    described = hashlib.sha256()
    for entry in chunk:
        if isinstance(entry, Record) and isinstance(entry.image, bytes):
            entry = dataclasses.replace(entry, image=hashlib.sha256(entry.image).digest())
        described.update(repr(entry).encode())
    return described.hexdigest()


def _identity(options: ConvertOptions) -> dict[str, Any]:
    return {"shard_records": options.shard_records, "prepare": dataclasses.asdict(options.prepare)}


def _check_same(file: Path, identity: dict[str, Any], out: Path) -> None:
    if not file.is_file():
        _write_json(file, identity)
    elif json.loads(file.read_text()) != identity:
        raise DataError(
            f"{file.parent.parent}: holds an interrupted conversion to {out} with other options; "
            "use the same options, or remove this folder to begin again"
        )


def _shard_path(work: Path, number: int) -> Path:
    return work / "data" / records_name(number)


def _report_path(work: Path, number: int) -> Path:
    return work / "state" / f"records-{number:05d}.json"


def _write_json(path: Path, value: Any) -> None:
    replace_file(path, json.dumps(value, ensure_ascii=False).encode())

"""Converts records to sharded ArrayRecord files: parallel, resumable and atomic.

    OUT/info.json                     content and source; written last
    OUT/records-00000.array_record    records, serialised by ``data.format.records.pack``
    OUT/texts-00000.array_record      records without images, ``data.format.records.pack_text``
    OUT/texts.npy                     numbers of captions and questions of every record, int32 (N, 2)
    OUT/skipped.jsonl                 skipped entries, with reasons

Files are written to ``.OUT.partial/`` first. The input is cut into shards by position, so a shard depends only on its
records: rerunning the command after an interruption keeps the shards whose records and image files are unchanged, and
gives the same files as an uninterrupted conversion. Images are copied, never moved or modified.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from magma_jax.data.format.records import (
    DUPLICATE,
    EXPECTED,
    HIDDEN,
    NOT_DOWNLOADED,
    DataError,
    Record,
    Skipped,
    count_samples,
)
from magma_jax.data.format.shards import INFO_FILE, SKIPPED_FILE, TEXTS_FILE, texts_name
from magma_jax.data.pillow_steps import limit_memory
from magma_jax.data.workers import cores, finished, worker_pool
from magma_jax.data.write.prepare import PrepareOptions
from magma_jax.data.write.resumable_shards import REPORT, remove_records, shard_path, to_json, writing, written_shard
from magma_jax.output import locked, partial_name, replace_file
from magma_jax.version import __version__

# Memory of a worker process in addition to the decoded image: a shard's buffers, and copies of the encoded image.
WORKER_MEMORY = 2**30


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    Attributes:
        prepare: how images are checked.
        shard_records: records per file.
        workers: number of processes; None for one per core, 0 to run in this process.
        max_skipped: largest fraction of samples (``Record.samples``) that may be skipped for reasons other than
            ``records.EXPECTED``. Above it the conversion fails but keeps its shards, so that rerunning it with a larger
            fraction only has to finish.
    """

    prepare: PrepareOptions = PrepareOptions()
    shard_records: int = 1024
    workers: int | None = None
    max_skipped: float = 0.05

    def __post_init__(self):
        if self.shard_records < 1:
            raise DataError(f"shard_records must be 1 or more, got {self.shard_records}")
        if self.workers is not None and self.workers < 0:
            raise DataError(f"workers must be 0 or more, got {self.workers}")
        if not 0 <= self.max_skipped <= 1:
            raise DataError(f"max_skipped is a share from 0 to 1, got {self.max_skipped}")


def convert(
    records: Iterable[Record | Skipped],
    out: str | Path,
    options: ConvertOptions = ConvertOptions(),
    *,
    source: Mapping[str, Any] | None = None,
    total: int | None = None,
) -> dict[str, Any]:
    """Writes a dataset folder from an iterable of records and returns the content of its ``info.json``.

    Args:
        records: the records, the same ones in the same order when an interrupted conversion is rerun. ``Skipped``
            entries go to the report.
        out: the dataset folder to write.
        options: see ``ConvertOptions``.
        source: description of the records' source, stored in ``info.json``.
        total: number of records, for the progress bar.

    Raises:
        DataError: ``out`` exists; a duplicate id; too many skipped samples; the interrupted conversion had another
            source or other options; the disk is full.
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
    """Writes a dataset folder from the shards of ``write_shards``; errors as of ``convert``.

    Args:
        out: the dataset folder to write.
        options: see ``ConvertOptions``.
        source: stored in ``info.json``.
        write_shards: writes all shards to the given work folder and returns their reports (``written_shard``) in order.
    """
    if out.exists():
        raise DataError(f"{out}: already exists; choose another name or remove it first")
    work = partial_name(out)
    with writing(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with locked(out.absolute()):
        try:
            with writing(work):
                for part in ("state", "data"):
                    (work / part).mkdir(parents=True, exist_ok=True)
                check_same(work / "state" / "options.json", _identity(options, source), out)
            reports = write_shards(work)
            with writing(work):
                info = _finish(work, reports, options, source)
                os.rename(work / "data", out)
        finally:
            # Keeps the finished shards of an interrupted conversion.
            if out.exists() or not any((work / "state").glob(REPORT.format("*"))):
                shutil.rmtree(work, ignore_errors=not work.exists())
    return info


def _write_shards(
    records: Iterable[Record | Skipped], work: Path, options: ConvertOptions, total: int | None
) -> list[dict[str, Any]]:
    """Writes all shards that no earlier run finished; returns the reports of all in order."""
    workers = cores() if options.workers is None else options.workers
    reports: list[dict[str, Any]] = []
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()

    def collect() -> None:
        reports.append(waiting.popleft().result())
        bar.update(reports[-1]["input"])
        bar.set_postfix_str(f"{sum(len(report['skipped']) for report in reports)} skipped")

    bar = tqdm(desc="converting", unit="record", total=total, disable=None)
    with bar, _executor(workers, options.prepare.max_pixels) as submit:
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
def _executor(workers: int, max_pixels: int) -> Iterator[Callable[..., concurrent.futures.Future]]:
    """Yields ``submit`` of a process pool, or a function that runs the work in this process."""
    if not workers:
        yield lambda function, *arguments: finished(function(*arguments))
        return
    pool = worker_pool(workers, limit_memory, (max_pixels, WORKER_MEMORY))
    try:
        yield pool.submit
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker process died, perhaps for lack of memory; run again to continue") from None
    finally:
        pool.shutdown(cancel_futures=True)


def chunks(records: Iterable[Record | Skipped], size: int) -> Iterator[list[Record | Skipped]]:
    """Cuts the input into shards and checks ids for duplicates, by hashes of eight bytes."""
    seen: set[bytes] = set()
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, size)):
        for entry in chunk:
            if isinstance(entry, Record):
                key = hashlib.blake2b(entry.id.encode(errors="surrogatepass"), digest_size=8).digest()
                if key in seen:
                    raise DataError(f"two records have the id {entry.id!r}; ids must be unique")
                seen.add(key)
        yield chunk


def _finish(
    work: Path, reports: list[dict[str, Any]], options: ConvertOptions, source: Mapping[str, Any]
) -> dict[str, Any]:
    """Checks the fraction of skipped samples, removes duplicates, and writes the files beside the shards."""
    again = _duplicates(reports)
    reports = [_without(report, drop) for report, drop in zip(reports, again, strict=True)]
    skipped = [entry for report in reports for entry in report["skipped"]]
    texts = [row for report in reports for row in report["texts"]]
    # Written before the check: if too many samples were skipped, the file shows why.
    lines = [to_json(skipped_line(*entry)) + b"\n" for entry in skipped]
    replace_file(work / "data" / SKIPPED_FILE, b"".join(lines))
    try:
        reasons = checked_reasons(skipped, sum(count_samples(*row) for row in texts), options.max_skipped)
    except DataError as error:
        raise DataError(f"{error}; {work / 'data' / SKIPPED_FILE} lists them" if skipped else str(error)) from None
    for number, drop in enumerate(again):
        if drop:
            remove_records(work, number, drop)
    files = {shard_path(work, n).name: len(report["ids"]) for n, report in enumerate(reports)}
    shards = {*files, *map(texts_name, files), SKIPPED_FILE}
    for path in (work / "data").iterdir():
        if path.name not in shards:  # from an earlier run with a longer source
            path.unlink()
    texts = np.array(texts, np.int32).reshape(-1, 2)
    np.save(work / "data" / TEXTS_FILE, texts)
    info = {
        "format": "magma_jax records",
        "magma_jax": __version__,
        "source": source,
        "records": len(texts),
        "captions": int(texts[:, 0].sum()),
        "questions": int(texts[:, 1].sum()),
        "skipped": reasons,
        "files": files,
    }
    # Written in place: the folder itself is renamed when complete, and must not contain temporary files.
    (work / "data" / INFO_FILE).write_bytes(to_json(info, indent=2))
    return info


def skipped_line(key: str, reason: str, samples: int, detail: str = "") -> dict[str, Any]:
    """A line of ``skipped.jsonl``."""
    return {"id": key, "reason": reason, "samples": samples} | ({"detail": detail} if detail else {})


def checked_reasons(skipped: Sequence[Sequence[Any]], kept: int, max_skipped: float) -> dict[str, int]:
    """Skipped samples by reason, the most frequent first; raises DataError if there are too many."""
    reasons: collections.Counter[str] = collections.Counter()
    details: dict[str, str] = {}
    for _, reason, samples, *detail in skipped:
        reasons[reason] += samples
        if any(detail) and reason not in EXPECTED:
            details.setdefault(reason, f" ({detail[0]})")
    counted = ", ".join(f"{count} x {reason}{details.get(reason, '')}" for reason, count in reasons.most_common())
    if not kept:
        raise DataError(f"nothing is left to convert ({counted or 'there was nothing to read'}); check the source")
    lost = sum(count for reason, count in reasons.items() if reason not in EXPECTED)
    total = kept + reasons.total() - reasons[NOT_DOWNLOADED] - reasons[HIDDEN]
    if lost > max_skipped * total:
        raise DataError(
            f"{lost} of {total} samples would be left out ({counted}), more than max_skipped "
            f"{max_skipped:.2%}; repair the source, or run again with a larger share"
        )
    return dict(reasons.most_common())


def _duplicates(reports: Sequence[dict[str, Any]]) -> list[set[str]]:
    """Ids to remove from each shard: records whose fingerprint an earlier record of any shard has."""
    seen: set[str] = set()
    found: list[set[str]] = []
    for report in reports:
        found.append(set())
        if report["fingerprints"]:
            for key, fingerprint in zip(report["ids"], report["fingerprints"], strict=True):
                if fingerprint in seen:
                    found[-1].add(key)
                seen.add(fingerprint)
    return found


def _without(report: dict[str, Any], drop: set[str]) -> dict[str, Any]:
    """Report of a shard without the records in ``drop``, which are skipped as duplicates."""
    rows = list(zip(report["ids"], report["texts"], strict=True))
    gone = [[key, DUPLICATE, count_samples(*texts), ""] for key, texts in rows if key in drop]
    return report | {
        "ids": [key for key, _ in rows if key not in drop],
        "texts": [texts for key, texts in rows if key not in drop],
        "skipped": report["skipped"] + gone,
    }


def _identity(options: ConvertOptions, source: Mapping[str, Any]) -> bytes:
    prepare = dataclasses.asdict(options.prepare)
    return to_json({"source": source, "shard_records": options.shard_records, "prepare": prepare})


def check_same(file: Path, identity: bytes, out: Path) -> None:
    """Raises DataError if an interrupted run with another identity left its file; writes it if there is none."""
    if not file.is_file():
        replace_file(file, identity)
    elif file.read_bytes() != identity:
        raise DataError(
            f"{file.parent.parent}: holds an interrupted conversion to {out} of another source or with other options; "
            "use the same, or remove this folder to begin again"
        )

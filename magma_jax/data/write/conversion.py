"""Records to sharded ArrayRecord files: in parallel, resumable, and whole or not there.

    OUT/info.json                     what it holds and where it came from; written last
    OUT/records-00000.array_record    records as ``data.format.records.pack`` gives them
    OUT/texts-00000.array_record      the same without images, ``data.format.records.pack_text``
    OUT/texts.npy                     number of captions and questions of every record, int32 (N, 2)
    OUT/skipped.jsonl                 what was left out, and why

Until then everything lies in ``.OUT.partial/``. The input is cut into shards by position, so a shard depends on its
records alone: an interrupted conversion is run again with the same command, keeps the shards whose records and image
files are what they were, and ends with the same files as one that was never interrupted. Images are copied, never
moved or changed.
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

# Of a worker process beside the image it decodes: a shard's buffers, and the encoded image several times over.
WORKER_MEMORY = 2**30


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """How a conversion runs.

    Attributes:
        prepare: how images are checked.
        shard_records: records a file.
        workers: processes; None for one a core, 0 for none but this one.
        max_skipped: the largest share of the samples (``Record.samples``) that may be left out, for other reasons than
            ``records.EXPECTED``; above it the conversion fails, with nothing lost: run again with a larger share, it
            only has to finish.
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
    """Writes a dataset folder from any iterable of records and returns the content of its ``info.json``.

    Args:
        records: gives the same records in the same order when an interrupted conversion is run again. Entries that
            are ``Skipped`` go to the report.
        out: the folder to be.
        options: see ``ConvertOptions``.
        source: kept in ``info.json``: where the records come from.
        total: number of records, for the progress bar.

    Raises:
        DataError: ``out`` exists; two records have one id; too much was skipped; the conversion that was interrupted
            had another source or other options; the disk is full.
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
    """Makes a dataset folder of what ``write_shards`` writes; arguments and errors as of ``convert``.

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
    with writing(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with locked(out.absolute()):
        try:
            with writing(work):
                for part in ("state", "data"):
                    (work / part).mkdir(parents=True, exist_ok=True)
                _check_same(work / "state" / "options.json", _identity(options, source), out)
            reports = write_shards(work)
            with writing(work):
                info = _finish(work, reports, options, source)
                os.rename(work / "data", out)
        finally:
            # Of an interrupted conversion what it has finished is kept, if anything.
            if out.exists() or not any((work / "state").glob(REPORT.format("*"))):
                shutil.rmtree(work, ignore_errors=not work.exists())
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
    """``submit`` of a pool of processes, or a call on the spot where there are none."""
    if not workers:
        yield lambda function, *arguments: finished(function(*arguments))
        return
    pool = worker_pool(workers, limit_memory, (max_pixels, WORKER_MEMORY))
    try:
        yield pool.submit
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a worker process died, perhaps for lack of memory; run again to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def chunks(records: Iterable[Record | Skipped], size: int) -> Iterator[list[Record | Skipped]]:
    """Cuts the input into shards; ids are checked on the way, as eight bytes each."""
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
    """Checks the share of what was skipped, leaves out duplicates, and writes the files beside the shards."""
    again = _duplicates(reports)
    reports = [_without(report, drop) for report, drop in zip(reports, again, strict=True)]
    skipped = [entry for report in reports for entry in report["skipped"]]
    texts = [row for report in reports for row in report["texts"]]
    # Before they are judged: if they are too many, this is what tells why.
    lines = [to_json(_skipped_line(*entry)) + b"\n" for entry in skipped]
    replace_file(work / "data" / SKIPPED_FILE, b"".join(lines))
    try:
        reasons = _checked_reasons(skipped, sum(count_samples(*row) for row in texts), options.max_skipped)
    except DataError as error:
        raise DataError(f"{error}; {work / 'data' / SKIPPED_FILE} lists them" if skipped else str(error)) from None
    for number, drop in enumerate(again):
        if drop:
            remove_records(work, number, drop)
    files = {shard_path(work, n).name: len(report["ids"]) for n, report in enumerate(reports)}
    shards = {*files, *map(texts_name, files), SKIPPED_FILE}
    for path in (work / "data").iterdir():
        if path.name not in shards:  # of a former run, when the source was longer
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
    # Written in place: the folder gets its name when it is whole, and nothing may be left beside its files.
    (work / "data" / INFO_FILE).write_bytes(to_json(info, indent=2))
    return info


def _skipped_line(key: str, reason: str, samples: int, detail: str = "") -> dict[str, Any]:
    return {"id": key, "reason": reason, "samples": samples} | ({"detail": detail} if detail else {})


def _checked_reasons(skipped: Sequence[Sequence[Any]], kept: int, max_skipped: float) -> dict[str, int]:
    """How many samples are left out for which reason, the most frequent first; too many raise DataError."""
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
    """For every shard the ids to leave out: those whose fingerprint an earlier record of any shard has."""
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
    """The report of a shard without the records in ``drop``, which are skipped as duplicates."""
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


def _check_same(file: Path, identity: bytes, out: Path) -> None:
    if not file.is_file():
        replace_file(file, identity)
    elif file.read_bytes() != identity:
        raise DataError(
            f"{file.parent.parent}: holds an interrupted conversion to {out} of another source or with other options; "
            "use the same, or remove this folder to begin again"
        )

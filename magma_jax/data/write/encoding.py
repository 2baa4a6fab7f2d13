"""Codes of a dataset folder's images, by an image tokenizer: resumable and atomic.

    OUT/info.json                   content, source and tokenizer; written last
    OUT/codes-00000.array_record    codes of every record: (views, tokens), see ``data.format.code_folder``
    OUT/texts-00000.array_record    records without images, ``data.format.records.pack_text``
    OUT/texts.npy                   numbers of captions and questions of every record, int32 (N, 2)
    OUT/skipped.jsonl               records with unusable images, with reasons

Files are written to ``.OUT.partial/`` first; rerunning the command after an interruption keeps the finished shards and
gives the same files as an uninterrupted run.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from magma_jax.data.batches.stored_images import ImageOptions, StoredImages
from magma_jax.data.format.code_folder import FORMAT, code_dtype, codes_name
from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError, Record, count_samples, pack_text
from magma_jax.data.format.shards import INFO_FILE, SKIPPED_FILE, TEXTS_FILE, shard_writer, texts_name
from magma_jax.data.workers import cores
from magma_jax.data.write.conversion import check_same, checked_reasons, skipped_line
from magma_jax.data.write.resumable_shards import REPORT, read_report, report_path, to_json, writing
from magma_jax.output import locked, partial_name, replace_file
from magma_jax.typing import Int, UInt8
from magma_jax.version import __version__


@runtime_checkable
class ImageEncoder(Protocol):
    """An image tokenizer.

    Attributes:
        image_size: pixels per side of the images it encodes.
        size: number of codes of its codebook.
        tokens: codes of an image.
        digest: identity of its weights.
    """

    image_size: int
    size: int
    tokens: int
    digest: str

    def encode(self, images: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, "N L"]:
        """Codes of images."""
        ...


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """Options of ``encode_folder``.

    Attributes:
        crops: random crops of every image, stored as further views beside the centre crop.
        flips: whether every view is also stored mirrored. Captions with left and right then contradict half of them.
        shard_records: records per file.
        batch_size: images that are encoded at a time.
        workers: decoding processes; None for one per core, 0 to decode in this process.
        max_skipped: largest fraction of samples that may be skipped.
    """

    crops: int = 0
    flips: bool = False
    shard_records: int = 1024
    batch_size: int = 64
    workers: int | None = None
    max_skipped: float = 0.05

    def __post_init__(self):
        for name, least in (("crops", 0), ("shard_records", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise DataError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise DataError(f"workers must be 0 or more, got {self.workers}")
        if not 0 <= self.max_skipped <= 1:
            raise DataError(f"max_skipped is a share from 0 to 1, got {self.max_skipped}")

    @property
    def views(self) -> int:
        """Views of every image: centre crop, its mirror image, random crops, theirs."""
        return (1 + self.crops) * (1 + self.flips)


def encode_folder(
    folder: str | Path, out: str | Path, encoder: ImageEncoder, options: EncodeOptions = EncodeOptions()
) -> dict[str, Any]:
    """Writes the codes and texts of a dataset folder and returns the content of ``info.json``.

    Raises:
        DataError: no dataset folder; ``out`` exists; too many unusable images; the interrupted run had another source,
            tokenizer or other options; the disk is full.
        OutputError: another command is writing ``out``.
    """
    out, records = Path(out), StoredRecords(folder)
    if out.exists():
        raise DataError(f"{out}: already exists; choose another name or remove it first")
    source = {
        "folder": Path(folder).absolute().name,
        "info": hashlib.sha256((Path(folder) / INFO_FILE).read_bytes()).hexdigest(),
        "tokenizer": encoder.digest,
        "image_size": encoder.image_size,
        "crops": options.crops,
        "flips": options.flips,
    }
    work = partial_name(out)
    with writing(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with locked(out.absolute()):
        try:
            with writing(work):
                for part in ("state", "data"):
                    (work / part).mkdir(parents=True, exist_ok=True)
                identity = {"source": source, "shard_records": options.shard_records}
                check_same(work / "state" / "options.json", to_json(identity), out)
            reports = _write_shards(records, folder, work, encoder, options)
            with writing(work):
                info = _finish(work, reports, encoder, options, source)
                os.rename(work / "data", out)
        finally:
            # Keeps the finished shards of an interrupted run.
            if out.exists() or not any((work / "state").glob(REPORT.format("*"))):
                shutil.rmtree(work, ignore_errors=not work.exists())
    return info


def _write_shards(
    records: StoredRecords, folder: str | Path, work: Path, encoder: ImageEncoder, options: EncodeOptions
) -> list[dict[str, Any]]:
    views = _Views(folder, encoder, options)
    reports = []
    try:
        bar = tqdm(total=len(records), desc="encoding", unit="record", disable=None)
        with bar:
            for number, start in enumerate(range(0, len(records), options.shard_records)):
                rows = range(start, min(start + options.shard_records, len(records)))
                files = [work / "data" / name for name in (codes_name(number), texts_name(codes_name(number)))]
                if all(file.is_file() for file in (report_path(work, number), *files)):
                    reports.append(read_report(work, number))
                else:
                    reports.append(_write_shard(work, number, records, rows, views, options))
                bar.update(len(rows))
    finally:
        views.close()
    return reports


def _write_shard(
    work: Path, number: int, records: StoredRecords, rows: range, views: "_Views", options: EncodeOptions
) -> dict[str, Any]:
    texts, skipped = [], []
    path = work / "data" / codes_name(number)
    with writing(path), shard_writer(path, work / "state") as writer:
        for start in range(rows.start, rows.stop, options.batch_size):
            part = range(start, min(start + options.batch_size, rows.stop))
            for row, codes, problem in views.of(part):
                record: Record = records.text(row)
                if problem is not None:
                    count = count_samples(len(record.captions), len(record.questions))
                    skipped.append([record.id, problem, count, ""])
                    continue
                writer.write(codes.tobytes(), pack_text(record))
                texts.append([len(record.captions), len(record.questions)])
    report = {"texts": texts, "skipped": skipped}
    with writing(path):
        replace_file(report_path(work, number), to_json(report))
    return report


class _Views:
    """Codes of all views of rows."""

    def __init__(self, folder: str | Path, encoder: ImageEncoder, options: EncodeOptions):
        workers = cores() if options.workers is None else options.workers
        self._encoder, self._options = encoder, options
        self._centre = StoredImages([folder], ImageOptions(encoder.image_size), workers)
        cropped = ImageOptions(encoder.image_size, augment="random_crop")
        self._cropped = StoredImages([folder], cropped, workers if options.crops else 0)

    def of(self, rows: range) -> Iterator[tuple[int, np.ndarray, str | None]]:
        """Each row, its codes (views, tokens), and why its image is unusable."""
        numbers = np.asarray(rows)
        pixels, problems = self._centre.load(numbers).result()
        views = [np.array(pixels)]
        for crop in range(self._options.crops):
            # A crop depends on the row alone, not on shards and batches.
            draws = [int(np.random.default_rng((crop, int(row))).integers(2**62)) for row in rows]
            views.append(np.array(self._cropped.load(numbers, np.array(draws)).result()[0]))
        if self._options.flips:
            views = [view for plain in views for view in (plain, plain[:, :, ::-1])]
        codes = np.stack([self._encoder.encode(np.ascontiguousarray(view)) for view in views], axis=1)
        codes = codes.astype(code_dtype(self._encoder.size))
        for place, row in enumerate(rows):
            yield row, codes[place], problems.get(place)

    def close(self) -> None:
        """Ends the decoding processes."""
        self._centre.close()
        self._cropped.close()


def _finish(
    work: Path, reports: list[dict[str, Any]], encoder: ImageEncoder, options: EncodeOptions, source: dict[str, Any]
) -> dict[str, Any]:
    """Checks the fraction of skipped samples and writes the files beside the shards."""
    skipped = [entry for report in reports for entry in report["skipped"]]
    texts = np.array([row for report in reports for row in report["texts"]], np.int32).reshape(-1, 2)
    replace_file(work / "data" / SKIPPED_FILE, b"".join(to_json(skipped_line(*entry)) + b"\n" for entry in skipped))
    reasons = checked_reasons(skipped, sum(count_samples(*row) for row in texts.tolist()), options.max_skipped)
    np.save(work / "data" / TEXTS_FILE, texts)
    info = {
        "format": FORMAT,
        "magma_jax": __version__,
        "source": source,
        "size": encoder.size,
        "tokens": encoder.tokens,
        "views": options.views,
        "tokenizer": encoder.digest,
        "records": len(texts),
        "captions": int(texts[:, 0].sum()),
        "questions": int(texts[:, 1].sum()),
        "skipped": reasons,
        "files": {codes_name(number): len(report["texts"]) for number, report in enumerate(reports)},
    }
    # Written in place: the folder itself is renamed when complete, and must not contain temporary files.
    (work / "data" / INFO_FILE).write_text(json.dumps(info, indent=2))
    return info

"""Pictures gathered from the web: img2dataset's tar files, and the lists of addresses that they were gathered from.

The lists (CC3M, CC12M, LAION, WIT) name pictures by URL alone, and what was downloaded lies in tar files that
img2dataset wrote, each member beside a JSON that repeats its URL. So a list is joined with such a folder by URL.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from magma_jax.data.format.records import NOT_DOWNLOADED, DataError, FileSlice, Record, Skipped
from magma_jax.data.readers.common import PICTURE_SUFFIXES, captioned, checked, read_lines

WIT_COLUMNS = (
    "language",
    "page_url",
    "image_url",
    "page_title",
    "section_title",
    "hierarchical_section_title",
    "caption_reference_description",
    "caption_attribution_description",
    "caption_alt_text_description",
    "mime_type",
    "original_height",
    "original_width",
    "is_main_image",
    "attribution_passes_lang_id",
    "page_changed_recently",
    "context_page_description",
    "context_section_description",
)
# What img2dataset records of a download itself, of no use for training.
_DOWNLOAD_FIELDS = ("status", "error_message", "key", "caption", "exif")


def read_img2dataset(source: Path, images: Path | None = None) -> Iterator[Record | Skipped]:
    """A folder of ``00000.tar`` with ``KEY.jpg``, ``KEY.txt``, ``KEY.json``; keys may have gaps.

    The caption is the ``.txt``, or ``caption`` of the ``.json`` where there is none. Columns of the ``.json`` and of
    the ``.parquet`` beside the tar, joined by key, become metadata.
    """
    for tar in _tars(source):
        rows = _parquet_rows(tar.with_suffix(".parquet"))
        for key, members in _samples(tar):
            known = {**rows.get(key, {}), **_json_of(members, tar)}
            try:
                caption = members[".txt"].read().decode() if ".txt" in members else known.get("caption")
            except UnicodeDecodeError:
                yield Skipped(key, "caption is not UTF-8")
                continue
            extra = {name: value for name, value in known.items() if name not in _DOWNLOAD_FIELDS}
            yield captioned(key, _picture_of(members), [_caption(caption, f"{tar}: caption of {key}")], extra)


def read_cc3m(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """Conceptual Captions 3M: lines of caption, tab, URL; ``images`` is a folder that img2dataset wrote."""
    return _joined_lines(source, images, caption=0, url=1)


def read_cc12m(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """Conceptual 12M: lines of URL, tab, caption, the other way round than CC3M."""
    return _joined_lines(source, images, caption=1, url=0)


def read_laion(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """LAION's parquet lists (``URL``, ``TEXT``, ...), a file or a folder, joined with img2dataset's folder by URL."""
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    downloads = _by_url(images)
    row = 0
    for file in files:
        for values in _parquet(file):
            row += 1
            lower = {name.lower(): value for name, value in values.items()}
            if "url" not in lower or "text" not in lower:
                raise DataError(f"{file}: no columns URL and TEXT (there is: {', '.join(values)})")
            extra = {name: value for name, value in lower.items() if name not in ("url", "text")}
            caption = _caption(lower["text"], f"{file}: TEXT of row {row}")
            yield _joined(str(row), lower["url"], [caption], downloads, extra | {"url": lower["url"]})


def read_wit(source: Path, images: Path, *, language: str = "") -> Iterator[Record | Skipped]:
    """WIT ``.tsv.gz``, 17 columns: reference, attribution and alt text are the captions, in this order.

    Args:
        source: a file, or a folder of ``.tsv.gz`` files.
        images: a folder that img2dataset wrote.
        language: keep only this one, such as ``en``.
    """
    files = sorted(source.glob("*.tsv*")) if source.is_dir() else [source]
    downloads = _by_url(images)
    captions = WIT_COLUMNS[6:9]
    for file in files:
        for number, line in read_lines(file):
            key = f"{file.name.split('.')[0]}/{number}"
            try:
                values = tuple(line.decode().split("\t"))
            except UnicodeDecodeError:
                yield Skipped(key, "caption is not UTF-8")
                continue
            if values == WIT_COLUMNS:  # released files open with their header
                continue
            if len(values) != len(WIT_COLUMNS):
                raise DataError(f"{file}: line {number} has {len(values)} columns, WIT has {len(WIT_COLUMNS)}")
            row = dict(zip(WIT_COLUMNS, values, strict=True))
            if language and row["language"] != language:
                continue
            texts = list(dict.fromkeys(row[name].strip() for name in captions))
            extra = {name: row[name] for name in ("language", "page_title", "section_title", "page_url", "image_url")}
            yield _joined(key, row["image_url"], texts, downloads, extra)


def _joined_lines(source: Path, images: Path, *, caption: int, url: int) -> Iterator[Record | Skipped]:
    downloads = _by_url(images)
    for number, line in read_lines(source):
        columns = line.split(b"\t")
        if len(columns) != 2:
            raise DataError(f"{source}: line {number} has {len(columns)} columns, expected 2")
        if b"://" not in columns[url]:
            raise DataError(f"{source}: line {number} has no URL in column {url + 1}; cc3m and cc12m differ in order")
        try:
            text, address = columns[caption].decode().strip(), columns[url].decode()
        except UnicodeDecodeError:
            yield Skipped(str(number), "caption is not UTF-8")
            continue
        yield _joined(str(number), address, [text], downloads, {"url": address})


def _joined(
    key: str, url: str | None, captions: Sequence[str], downloads: Mapping[str, FileSlice], extra: Mapping[str, Any]
) -> Record | Skipped:
    return captioned(key, downloads[url], captions, extra) if url in downloads else Skipped(key, NOT_DOWNLOADED)


def _caption(value: Any, where: str) -> str:
    """A caption without surrounding space; columns may be empty."""
    return "" if value is None else checked(value, str, where).strip()


def _by_url(folder: Path) -> dict[str, FileSlice]:
    found = {}
    for tar in _tars(folder):
        for _, members in _samples(tar):
            picture, url = _picture_of(members), _json_of(members, tar).get("url")
            if picture is not None and url:
                found[url] = picture
    return found


def _tars(folder: Path) -> list[Path]:
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else [folder]
    if not tars:
        raise DataError(f"{folder}: holds no .tar files; give the folder that img2dataset wrote")
    return tars


def _samples(path: Path) -> Iterator[tuple[str, dict[str, FileSlice]]]:
    """Key and members by suffix of every sample of a tar; members of one key stand together (webdataset's rule)."""
    try:
        with tarfile.open(path, "r:") as tar:
            key, members = None, {}
            for member in tar:
                tar.members = []  # or the archive remembers every member it has passed
                if not member.isfile():
                    continue
                stem, _, suffix = member.name.rpartition("/")[2].partition(".")
                if stem != key:
                    if key is not None:
                        yield key, members
                    key, members = stem, {}
                members["." + suffix.lower()] = FileSlice(str(path), member.offset_data, member.size)
            if key is not None:
                yield key, members
            # Python takes whatever is no header for the end; a whole archive ends with empty blocks.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no end of the archive at byte {tar.offset}")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a whole tar archive ({error}); fetch it again") from None


def _picture_of(members: Mapping[str, FileSlice]) -> FileSlice | None:
    return next((members[suffix] for suffix in PICTURE_SUFFIXES if suffix in members), None)


def _json_of(members: Mapping[str, FileSlice], tar: Path) -> dict[str, Any]:
    if ".json" not in members:
        return {}
    try:
        content = json.loads(members[".json"].read())
    except ValueError as error:
        raise DataError(f"{tar}: a .json member is no valid JSON ({error}); fetch the file again") from None
    return checked(content, dict, f"{tar}: a .json member")


def _parquet_rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in _parquet(path) if row.get("key")} if path.is_file() else {}


def _rows(batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    """The rows in JSON's values: dates and decimals become text."""
    # Timestamps here, for Python has none as fine as nanoseconds.
    fine = pyarrow.types.is_timestamp
    columns = [column.cast("string") if fine(column.type) else column for column in batch.columns]
    plain = pyarrow.RecordBatch.from_arrays(columns, batch.schema.names)
    return json.loads(json.dumps(plain.to_pylist(), default=str))


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from _rows(batch)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole parquet file ({error}); fetch it again") from None

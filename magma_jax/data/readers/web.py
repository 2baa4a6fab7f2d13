"""Web datasets: img2dataset's tar files, and the URL lists they were downloaded from.

The lists (CC3M, CC12M, LAION, WIT) identify images by URL. Downloaded images are in img2dataset's tar files, each
beside a JSON with its URL, so a list is joined with such a folder by URL.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import NOT_DOWNLOADED, DataError, Record, Skipped
from magma_jax.data.readers.common import IMAGE_SUFFIXES, Missing, captioned, checked, files_in, read_lines
from magma_jax.data.readers.parquet import parquet_rows
from magma_jax.data.readers.tars import Content, content_of, tar_samples, tars_in

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
# Fields in which img2dataset records the download; not kept as metadata.
_DOWNLOAD_FIELDS = ("status", "error_message", "key", "caption", "exif")
# Limit on the images of compressed tars, which are held in memory while a list is joined with them.
_MOST_HELD = 4 << 30


def read_img2dataset(source: Path, images: Path | None = None) -> Iterator[Record | Skipped]:
    """A folder of ``00000.tar`` with ``KEY.jpg``, ``KEY.txt``, ``KEY.json``; keys may have gaps.

    The caption is the ``.txt``, or else ``caption`` in the ``.json``. Columns of the ``.json`` and of the ``.parquet``
    beside the tar, joined by key, become metadata; its rows of failed downloads are skipped.
    """
    for tar in tars_in(source):
        rows = _rows_beside(tar)
        for sample in tar_samples(tar):
            if isinstance(sample, Skipped):
                yield sample
                continue
            key, members = sample
            known = {**rows.pop(key.removeprefix("./"), {}), **_json_of(members, tar)}
            try:
                caption = content_of(members[".txt"]).decode() if ".txt" in members else known.get("caption")
            except UnicodeDecodeError:
                yield Skipped(key, "caption is not UTF-8")
                continue
            extra = {name: value for name, value in known.items() if name not in _DOWNLOAD_FIELDS}
            captions = [] if caption is None else [_caption(caption, f"{tar}: caption of {key}")]
            yield captioned(key, _image_of(members), captions, extra)
        for key, row in rows.items():
            if row.get("status") not in (None, "success"):
                yield Skipped(key, NOT_DOWNLOADED, detail=str(row.get("error_message") or row["status"]))


def read_cc3m(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """Conceptual Captions 3M: lines of caption, tab, URL; ``images`` is a folder written by img2dataset.

    An optional header line names the columns, ``caption`` and ``url``, as required by img2dataset, and sets their
    order.
    """
    return _joined_lines(source, images, caption=0, url=1)


def read_cc12m(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """Conceptual 12M: lines of URL, tab, caption, the reverse of CC3M."""
    return _joined_lines(source, images, caption=1, url=0)


def read_laion(source: Path, images: Path, *, url: str = "", caption: str = "") -> Iterator[Record | Skipped]:
    """LAION's parquet lists, a file or a folder, joined with img2dataset's folder by URL.

    Args:
        source: the file, or a folder whose ``.parquet`` files are read in name order.
        images: a folder written by img2dataset.
        url: URL column; default: ``url``, ignoring case.
        caption: caption column; default: ``text`` (LAION) or else ``caption`` (ReLAION), ignoring case.
    """
    files = files_in(source, "*.parquet") if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: holds no .parquet files")
    downloads = _by_url(images)
    row = 0
    for file in files:
        chosen = ()
        for values in parquet_rows(file):
            row += 1
            # All rows of a file have the same columns.
            addresses, captions = chosen = chosen or (
                _column(list(values), [url] if url else ["url"], "url", file),
                _column(list(values), [caption] if caption else ["text", "caption"], "caption", file),
            )
            extra = {name.lower(): value for name, value in values.items() if name not in chosen}
            said = _caption(values[captions], f"{file}: {captions} of row {row}")
            yield _joined(str(row), values[addresses], [said], downloads, extra | {"url": values[addresses]})


def _column(columns: Sequence[str], names: Sequence[str], option: str, file: Path) -> str:
    """The first of these column names that exists, exactly or ignoring case."""
    for name in names:
        found = [name] if name in columns else [column for column in columns if column.lower() == name.lower()]
        if len(found) > 1:
            raise DataError(f"{file}: {' and '.join(found)} differ in case alone; choose with --option {option}=COLUMN")
        if found:
            return found[0]
    raise DataError(
        f"{file}: no column {' or '.join(names)} in any case (there is: {', '.join(columns)}); "
        f"name it with --option {option}=COLUMN"
    )


def read_wit(source: Path, images: Path, *, language: str = "") -> Iterator[Record | Skipped]:
    """WIT ``.tsv.gz``, 17 columns: reference, attribution and alt text are the captions, in this order.

    Args:
        source: a file, or a folder of ``.tsv.gz`` files.
        images: a folder written by img2dataset.
        language: keep only this language, such as ``en``.
    """
    files = files_in(source, "*.tsv*") if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: holds no .tsv or .tsv.gz files")
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
            if values == WIT_COLUMNS:  # the header line of released files
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
        names = [column.strip().lower() for column in columns]
        if number == 1 and sorted(names) == [b"caption", b"url"]:
            caption, url = names.index(b"caption"), names.index(b"url")
            continue
        if b"://" not in columns[url]:
            raise DataError(f"{source}: line {number} has no URL in column {url + 1}; cc3m and cc12m differ in order")
        try:
            text, address = columns[caption].decode().strip(), columns[url].decode()
        except UnicodeDecodeError:
            yield Skipped(str(number), "caption is not UTF-8")
            continue
        yield _joined(str(number), address, [text], downloads, {"url": address})


def _joined(
    key: str, url: str | None, captions: Sequence[str], downloads: Mapping[str, Content], extra: Mapping[str, Any]
) -> Record | Skipped:
    image = None if url is None else downloads.get(url)
    return Skipped(key, NOT_DOWNLOADED) if image is None else captioned(key, image, captions, extra)


def _caption(value: Any, where: str) -> str:
    """Caption without surrounding whitespace; "" for an empty column."""
    return "" if value is None else checked(value, str, where).strip()


def _by_url(folder: Path) -> dict[str, Content]:
    found: dict[str, Content] = {}
    held = 0
    for tar in tars_in(folder):
        for sample in tar_samples(tar):
            if isinstance(sample, Skipped):
                continue
            _, members = sample
            image, url = _image_of(members), _json_of(members, tar).get("url")
            if isinstance(image, Missing) or not url:
                continue
            found[url] = image
            held += len(image) if isinstance(image, bytes) else 0
            if held > _MOST_HELD:
                raise DataError(
                    f"{tar}: more than {_MOST_HELD >> 30} GiB of images in compressed tars, too much to join with a "
                    "list; unpack them first: gunzip"
                )
    if not found:
        raise DataError(f"{folder}: no image with a .json beside it that has its 'url', as img2dataset writes them")
    return found


def _image_of(members: Mapping[str, Content]) -> Content | Missing:
    return next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), Missing())


def _json_of(members: Mapping[str, Content], tar: Path) -> dict[str, Any]:
    if ".json" not in members:
        return {}
    try:
        content = json.loads(content_of(members[".json"]))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{tar}: a .json member is not valid JSON ({error}); fetch the file again") from None
    return checked(content, dict, f"{tar}: a .json member")


def _rows_beside(tar: Path) -> dict[str, dict[str, Any]]:
    """Rows of img2dataset's parquet file beside a tar, by key."""
    path = tar.with_name(re.sub(r"\.(tar(\.gz)?|tgz)$", "", tar.name) + ".parquet")
    return {row["key"]: row for row in parquet_rows(path) if row.get("key")} if path.is_file() else {}

"""Tables of one's own: a row is an image with captions, questions and answers.

JSON lines, JSON lists, CSV, TSV and Parquet. Images are named by path, or embedded as ``{"bytes", "path"}``, as in
Hugging Face's datasets. Also a folder with ``metadata.jsonl`` or ``metadata.csv`` beside its images (imagefolder), a
folder of Parquet shards, and LLaVA's conversations.
"""

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import DataError, FileSlice, Question, Record, Skipped, count_samples
from magma_jax.data.readers.common import (
    ImageFolder,
    Missing,
    checked,
    field,
    files_in,
    lines_of,
    read_json,
    read_json_lines,
    read_text,
)
from magma_jax.data.readers.parquet import raw_parquet_rows

# Names of columns in the order in which they are looked for.
IMAGE = ("image", "file_name", "image_path", "path", "img", "jpg")
CAPTION = ("caption", "captions", "text", "texts")
QUESTION, ANSWER = ("question",), ("answer", "answers")
# Metadata of imagefolder, in the order of preference.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# LLaVA's placeholder of the image in a text.
_PLACE = "<image>"


def read_table(
    source: Path,
    images: Path | None = None,
    *,
    image: str = "",
    caption: str = "",
    question: str = "",
    answer: str = "",
    id: str = "",
) -> Iterator[Record | Skipped]:
    """Rows of a table; all rows about one image file are one record.

    Args:
        source: a file, a folder with ``metadata.jsonl`` or ``metadata.csv``, or a folder of Parquet files.
        images: folder of the images that rows name; default: the table's.
        image: column of images; default: the first of ``IMAGE`` that is there.
        caption: column of a caption or a list of them; default: the first of ``CAPTION``.
        question: column of a question; default: ``question``.
        answer: column of an answer or a list of them; default: the first of ``ANSWER``.
        id: column of ids; default: the image's path, or the number of the row.
    """
    chosen = {"image": image, "caption": caption, "question": question, "answer": answer, "id": id}
    files = _files(source)
    folder = images or (source if source.is_dir() else source.parent)
    columns: _Columns | None = None
    by_path: dict[str, _Texts] = {}
    last: _Embedded | None = None
    seen: dict[str, int] = defaultdict(int)
    for file in files:
        for number, row in _rows(file):
            where = f"{file}: row {number}"
            columns = columns or _Columns.of(row, chosen, file)
            content = columns.value(row, "image", where)
            texts = columns.texts(row, where)
            name, data = _image(content, where, columns.image)
            if data is None:
                found = by_path.setdefault(name, _Texts())
                found.add(texts, columns.id_of(row, name))
                continue
            digest = hashlib.sha256(data).digest()
            if last is not None and last.digest == digest:  # rows about one image follow each other
                last.texts.add(texts, columns.id_of(row, str(number)))
                continue
            if last is not None:
                yield from last.entries(seen)
            last = _Embedded(digest, data, _Texts())
            last.texts.add(texts, columns.id_of(row, name or str(number)))
    if columns is None:
        raise DataError(f"{source}: holds no rows")
    if last is not None:
        yield from last.entries(seen)
    if by_path:
        found_images = ImageFolder(folder)
        for name, found in by_path.items():
            yield from found.entries(found_images.find(name), seen)


def read_llava(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """LLaVA's conversations: a JSON list of ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.

    A turn of ``human`` and the next one of ``gpt`` are a question and its answer; ``<image>`` is dropped. Conversations
    without an image are skipped.
    """
    folder, grouped, seen = ImageFolder(images), defaultdict[str, _Texts](_Texts), defaultdict[str, int](int)
    entries = read_json_lines(source) if source.suffix == ".jsonl" else enumerate(read_json(source, list), start=1)
    for number, entry in entries:
        where = f"{source}: entry {number}"
        turns = field(entry, "conversations", where, list)
        key = str(entry.get("id", number))
        if not entry.get("image"):
            yield Skipped(key, "conversation without an image", max(len(turns) // 2, 1))
            continue
        name = field(entry, "image", where, (str, list))
        if isinstance(name, list):
            if len(name) != 1:
                yield Skipped(key, "conversation about several images", max(len(turns) // 2, 1))
                continue
            name = checked(name[0], str, f"{where}: 'image'")
        questions = []
        for asked, said in zip(turns[::2], turns[1::2], strict=False):
            speakers = [field(turn, "from", where, str) for turn in (asked, said)]
            if speakers != ["human", "gpt"]:
                raise DataError(f"{where}: turns of {' and '.join(speakers)}; expected human and gpt in turns")
            texts = [field(turn, "value", where, str).replace(_PLACE, "").strip() for turn in (asked, said)]
            questions.append((texts[0], (texts[1],)))
        grouped[name].add(((), questions), key)
    for name, found in grouped.items():
        yield from found.entries(folder.find(name), seen)


# Captions, and questions with their answers.
_Content = tuple[Sequence[str], Sequence[tuple[str, tuple[str, ...]]]]


class _Texts:
    """Captions and questions about one image."""

    def __init__(self):
        self.key = ""
        self._captions: dict[str, None] = {}
        self._questions: list[tuple[str, tuple[str, ...]]] = []

    def add(self, texts: _Content, key: str) -> None:
        self.key = self.key or key
        self._captions |= dict.fromkeys(texts[0])
        self._questions += texts[1]

    def entries(self, image: FileSlice | bytes | Missing, seen: dict[str, int]) -> Iterator[Record | Skipped]:
        """The record; a key that was seen before gets a number."""
        seen[self.key] += 1
        key = self.key if seen[self.key] == 1 else f"{self.key}#{seen[self.key]}"
        captions = tuple(caption for caption in self._captions if caption)
        kept = [question for question in self._questions if question[0] and any(question[1])]
        if len(kept) < len(self._questions):
            yield Skipped(key, "question without answers", len(self._questions) - len(kept))
        if isinstance(image, Missing):
            yield image.skipped(key, count_samples(len(captions), len(kept)))
        elif captions or kept:
            questions = [Question(f"{key}/{i}", asked, answers) for i, (asked, answers) in enumerate(kept)]
            yield Record(key, image, captions, tuple(questions))
        elif not self._questions:
            yield Skipped(key, "empty caption" if self._captions else "image without an annotation")


class _Embedded:
    """An image in the table, while the rows about it are read."""

    def __init__(self, digest: bytes, data: bytes, texts: _Texts):
        self.digest, self._data, self.texts = digest, data, texts

    def entries(self, seen: dict[str, int]) -> Iterator[Record | Skipped]:
        yield from self.texts.entries(self._data, seen)


class _Columns:
    """The columns of a table that are read; None for those that it lacks."""

    def __init__(self, image: str, caption: str | None, question: str | None, answer: str | None, key: str | None):
        self.image, self._caption, self._question, self._answer, self._key = image, caption, question, answer, key

    @classmethod
    def of(cls, row: Mapping[str, Any], chosen: Mapping[str, str], file: Path) -> "_Columns":
        """Chosen columns, or those with a usual name.

        Raises:
            DataError: a chosen column that is not there, no image, or no text.
        """
        has = ", ".join(list(row)[:12])

        def find(what: str, usual: Sequence[str]) -> str | None:
            if not chosen[what]:
                return next((name for name in usual if name in row), None)
            if chosen[what] not in row:
                raise DataError(f"{file}: no column {chosen[what]!r} (there is: {has})")
            return chosen[what]

        image, caption = find("image", IMAGE), find("caption", CAPTION)
        question, answer = find("question", QUESTION), find("answer", ANSWER)
        if image is None:
            raise DataError(f"{file}: no column of images (there is: {has}); name it with --option image=COLUMN")
        if caption is None and (question is None or answer is None):
            raise DataError(
                f"{file}: no column of captions, or of questions and answers (there is: {has}); name them with "
                "--option caption=COLUMN or question=COLUMN answer=COLUMN"
            )
        if question is None or answer is None:
            question = answer = None
        return cls(image, caption, question, answer, find("id", ()))

    def value(self, row: Mapping[str, Any], what: str, where: str) -> Any:
        return field(row, self.image, where)

    def id_of(self, row: Mapping[str, Any], otherwise: str) -> str:
        return otherwise if self._key is None else str(row.get(self._key, otherwise))

    def texts(self, row: Mapping[str, Any], where: str) -> _Content:
        captions = self._several(row, self._caption, where)
        if self._question is None:
            return captions, ()
        asked = [text for text in self._several(row, self._question, where) if text]
        if not asked:
            return captions, ()
        if len(asked) > 1:
            raise DataError(f"{where}: {self._question!r} holds {len(asked)} questions; write a row for each")
        return captions, [(asked[0], self._several(row, self._answer, where))]

    def _several(self, row: Mapping[str, Any], column: str | None, where: str) -> tuple[str, ...]:
        """Texts of a column that holds one, several, or none."""
        value = None if column is None else row.get(column)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        texts = []
        for text in values:
            number = isinstance(text, int | float) and not isinstance(text, bool)
            texts.append(str(text) if number else checked(text, str, f"{where}: {column!r}").strip())
        return tuple(texts)


def _image(value: Any, where: str, column: str) -> tuple[str, bytes | None]:
    """Path of an image, and its bytes if they are in the table.

    Raises:
        DataError: neither a path nor bytes.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        return "", value
    if isinstance(value, str) and value:
        return value, None
    if isinstance(value, Mapping) and (isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)):
        return value.get("path") or "", value.get("bytes")
    kind = f"{len(value)} images" if isinstance(value, list) else f"{value!r:.40}"
    raise DataError(f"{where}: {column!r} is {kind}, neither the path of an image nor its bytes")


def _files(source: Path) -> list[Path]:
    """The files of a table.

    Raises:
        DataError: a folder without a table, or a file of another kind.
    """
    if source.is_dir():
        metadata = [source / name for name in METADATA if (source / name).is_file()]
        files = metadata[:1] or files_in(source, "*.parquet") or files_in(source / "data", "*.parquet")
        if not files:
            raise DataError(f"{source}: holds neither {', '.join(METADATA)} nor Parquet files")
        return files
    if source.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{source}: its name must end with {', '.join(_SUFFIXES)}")
    return [source]


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields number (from 1) and columns of every row."""
    match file.suffix.lower():
        case ".jsonl":
            yield from read_json_lines(file)
        case ".json":
            for number, row in enumerate(read_json(file, list), start=1):
                yield number, checked(row, dict, f"{file}: row {number}")
        case ".parquet":
            yield from enumerate(raw_parquet_rows(file), start=1)
        case suffix:
            yield from _separated(file, "\t" if suffix == ".tsv" else ",")


def _separated(file: Path, separator: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a header; quoted cells may hold line breaks."""
    text = "\n".join(lines_of(read_text(file)))
    try:
        reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
        header = next(reader, None)
        if header is None:
            raise DataError(f"{file}: is empty; its first line names the columns")
        if twice := {name for name in header if header.count(name) > 1}:
            raise DataError(f"{file}: two columns are called {min(twice)!r}; rename one")
        for number, cells in enumerate(reader, start=1):
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{file}: row {number} has {len(cells)} cells, the header has {len(header)}")
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{file}: is not a table of cells separated by {separator!r} ({error})") from None

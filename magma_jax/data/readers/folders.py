"""Folder formats: images with text files, the original's layout, and datasets prepared by TFDS."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import DataError, FileSlice, Record, Skipped
from magma_jax.data.readers.common import (
    IMAGE_SUFFIXES,
    Missing,
    captioned,
    checked,
    field,
    files_below,
    lines_of,
    read_json,
    within,
)

# Package of tensorflow_datasets' own feature classes.
_FEATURES = "tensorflow_datasets.core.features."


def read_folder(source: Path, images: Path | None = None) -> Iterator[Record | Skipped]:
    """Images below a folder, each with captions in ``SAME_NAME.txt``, one per line.

    Hidden files are skipped and counted.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder")
    ignored: list[Skipped] = []
    paths = sorted(map(Path, files_below(source, IMAGE_SUFFIXES, ignored)))
    yield from sorted(ignored, key=lambda entry: entry.id)
    if not paths:
        but = f", only {len(ignored)} hidden files" if ignored else ""
        raise DataError(f"{source}: holds no images ({', '.join(IMAGE_SUFFIXES)}){but}")
    for path in paths:
        key, text = path.relative_to(source).with_suffix("").as_posix(), path.with_suffix(".txt")
        if not text.is_file():
            yield Skipped(key, "image without an annotation")
            continue
        if path.exists() and not path.is_file():  # reading a pipe might block
            yield Skipped(key, "image is not a regular file")
            continue
        try:
            lines = lines_of(text.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError:
            yield Skipped(key, "caption is not UTF-8")
            continue
        yield captioned(key, FileSlice(str(path)), [line.strip() for line in lines])


def read_magma(source: Path, images: Path | None = None) -> Iterator[Record | Skipped]:
    """The original's layout: ``image_data/K/N.json`` with captions and metadata, ``images/K/X.jpg``.

    The default of ``image_path`` is ``images/K/N.jpg``.
    """
    data = source / "image_data"
    files = sorted(map(Path, files_below(data, (".json",)))) if data.is_dir() else []
    if not files:
        raise DataError(f"{source}: no image_data/*/*.json; give the folder that holds images/ and image_data/")
    for file in files:
        entry = read_json(file, dict)
        place = file.relative_to(data).with_suffix("").as_posix()
        name = field(entry, "image_path", str(file), str) if "image_path" in entry else f"images/{place}.jpg"
        path = within(source, name, str(file))
        captions = [checked(c, str, f"{file}: a caption").strip() for c in field(entry, "captions", str(file), list)]
        known = checked(entry.get("metadata") or {}, dict, f"{file}: 'metadata'")
        yield captioned(
            place, FileSlice(str(path)) if path.is_file() else Missing((name,), str(source)), captions, known
        )


def read_tfds(
    source: Path, images: Path | None = None, *, split: str = "train", image: str = "image", caption: str = ""
) -> Iterator[Record | Skipped]:
    """Datasets prepared by TFDS as array_record, read without TensorFlow.

    Only TFDS's own feature classes are allowed: for others it would run Python code of the dataset.

    Args:
        source: folder of the prepared dataset, ``DATA_DIR/NAME[/CONFIG]/VERSION``.
        images: not used.
        split: split of the dataset.
        image: image feature; its encoded bytes are kept.
        caption: text feature, nested ones with slashes (``captions/text``); default: the first of ``captions/text``,
            ``caption``, ``captions``, ``text`` that exists.
    """
    import tensorflow_datasets as tfds

    source = source.expanduser()  # as in TFDS, so that it reads the file that was checked
    if (source / "features.json").is_file():
        _check_features(read_json(source / "features.json"), source / "features.json")
    try:
        builder = tfds.builder_from_directory(source)
        # A decorator in TFDS hides the parameters from type checkers.
        decoders = {image: tfds.decode.SkipDecoding()}
        data = builder.as_data_source(split, decoders=decoders)  # pyright: ignore[reportCallIssue]
    except (ValueError, KeyError, OSError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source}: not a dataset that TFDS prepared as array_record, split {split!r} ({reason:.200})"
        ) from None
    names = [caption] if caption else ["captions/text", "caption", "captions", "text"]
    for row in range(len(data)):
        example = data[row]
        texts = next((found for name in names if (found := _feature(example, name)) is not None), None)
        if texts is None:
            raise DataError(f"{source}: no feature {' or '.join(names)} (there is: {', '.join(example)})")
        captions = [_text(text) for text in (texts if not isinstance(texts, bytes | str) else [texts])]
        ids = (_feature(example, f"{image}/id"), _feature(example, "id"), row)
        key = _text(next(found for found in ids if found is not None))
        yield captioned(key, bytes(field(example, image, str(source))), captions)


def _check_features(value: Any, file: Path) -> None:
    """Raises DataError if a feature description names a class outside TFDS."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            for key in ("type", "pythonClassName", "python_class_name"):
                name = value.get(key)
                # TFDS imports the module of a class, which runs it; its own modules are already imported.
                own = str(name).startswith(_FEATURES) and str(name).rpartition(".")[0] in sys.modules
                if isinstance(name, str) and not own:
                    raise DataError(
                        f"{file}: the feature type {name!r} does not come with tensorflow_datasets; reading it would "
                        "run Python code of the dataset. Prepare it with TFDS's own types"
                    )
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
        elif isinstance(value, str):
            try:
                left.append(json.loads(value))  # descriptions may be nested JSON strings
            except (ValueError, RecursionError):
                continue


def _feature(example: Mapping[str, Any], name: str) -> Any:
    value: Any = example
    if name in example:
        return example[name]
    for part in name.split("/"):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and all(isinstance(item, Mapping) and part in item for item in value):
            value = [item[part] for item in value]
        else:
            return None
    return value


def _text(value: Any) -> str:
    return (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).strip()

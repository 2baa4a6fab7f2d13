"""Region descriptions: Visual Genome, Localized Narratives."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from magma_jax.data.format.records import DataError, Record, Skipped
from magma_jax.data.readers.common import (
    ID,
    ImageFolder,
    captioned,
    field,
    files_in,
    metadata,
    read_json,
    read_json_lines,
    text,
)

BOX = ("region_id", "x", "y", "width", "height")


def read_visual_genome(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """``region_descriptions.json``: every phrase is a caption; ``metadata["regions"]`` has the boxes in the same order.

    Boxes are in pixels, unchanged; x and y may be negative.
    """
    image_files = ImageFolder(images)
    for entry in read_json(source, list):
        key = field(entry, "image_id" if "image_id" in entry else "id", f"{source}: image", ID)
        where = f"{source}: image {key}"
        regions = [region for region in field(entry, "regions", where, list) if text(region, "phrase", where)]
        captions = [text(region, "phrase", where) for region in regions]
        boxes = [metadata(region, BOX) for region in regions]
        yield captioned(str(key), image_files.find(f"{key}.jpg"), captions, {"regions": boxes})


def read_localized_narratives(source: Path, images: Path, *, traces: bool = False) -> Iterator[Record | Skipped]:
    """Localized Narratives: JSON lines, one file or a folder of shards, one record per line.

    The record id is ``IMAGE/ANNOTATOR``, and ``IMAGE/ANNOTATOR/2`` for an annotator's second description of an image.

    Args:
        source: the file, or a folder whose ``.jsonl`` files are read in name order.
        images: image folder of COCO, Flickr30k, ADE20k or Open Images.
        traces: keep mouse traces and timed words in the metadata (large).
    """
    files = files_in(source, "*.jsonl") if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: holds no .jsonl files")
    image_files = ImageFolder(images)
    kept = ("dataset_id", "annotator_id", "voice_recording") + (("timed_caption", "traces") if traces else ())
    times: Counter[str] = Counter()
    for file in files:
        for number, entry in read_json_lines(file):
            where = f"{file}: line {number}"
            image, caption = str(field(entry, "image_id", where, ID)), text(entry, "caption", where)
            key = f"{image}/{entry.get('annotator_id', 0)}"
            times[key] += 1
            key += f"/{times[key]}" if times[key] > 1 else ""
            names = [f"{image}.jpg", f"{image.zfill(12)}.jpg"]
            names += [f"COCO_{split}2014_{image.zfill(12)}.jpg" for split in ("train", "val")]
            yield captioned(key, image_files.find(*names), [caption], metadata(entry, kept))

"""COCO caption formats: the annotation files of 2014 and 2017, Karpathy's split, NoCaps."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from magma_jax.data.format.records import DataError, Record, Skipped
from magma_jax.data.readers.common import ID, ImageFolder, captioned, claim, field, metadata, read_json, text

IMAGE_FIELDS = ("width", "height", "domain", "open_images_id", "coco_url", "license")


def read_coco(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """``captions_val2014.json`` and similar files, NoCaps included (its ``domain`` goes to the metadata).

    One record per image, captions in file order, joined by ``image_id``; 1 and "1" are the same id.
    """
    content = read_json(source)
    image_files = ImageFolder(images)
    captions: dict[str, list[str]] = defaultdict(list)
    for entry in field(content, "annotations", str(source), list):
        key = str(field(entry, "image_id", f"{source}: annotation", ID))
        captions[key].append(text(entry, "caption", f"{source}: annotation of image {key}"))
    listed: set[str] = set()
    for image in field(content, "images", str(source), list):
        key = claim(field(image, "id", f"{source}: image", ID), listed, f"{source}: images")
        name = field(image, "file_name", f"{source}: image {key}", str)
        known = {"file_name": name} | metadata(image, IMAGE_FIELDS)
        yield captioned(key, image_files.find(name), captions.get(key, ()), known)
    for key in captions:
        if key not in listed:
            yield Skipped(key, "annotation of an image that the file does not list")


def read_karpathy(source: Path, images: Path, *, split: str = "train") -> Iterator[Record | Skipped]:
    """Karpathy's ``dataset_coco.json``: captions of COCO 2014 in other splits.

    Args:
        source: the file.
        images: folder with ``train2014/`` and ``val2014/``.
        split: ``train`` (with ``restval``, as is usual), ``train_only``, ``restval``, ``val``, ``test``.
    """
    splits = {"train": ("train", "restval"), "train_only": ("train",)}.get(split, (split,))
    image_files = ImageFolder(images)
    found_any = False
    for image in field(read_json(source), "images", str(source), list):
        if field(image, "split", f"{source}: image", str) not in splits:
            continue
        found_any = True
        key = str(field(image, "cocoid" if "cocoid" in image else "imgid", f"{source}: image", ID))
        where = f"{source}: image {key}"
        name = field(image, "filename", where, str)
        folder = field(image, "filepath", where, str) if "filepath" in image else "."
        captions = [text(sentence, "raw", where) for sentence in field(image, "sentences", where, list)]
        known = {"file_name": name} | metadata(image, ("split", "filepath"))
        yield captioned(key, image_files.find(f"{folder}/{name}", name), captions, known)
    if not found_any:
        raise DataError(f"{source}: no image of split {split!r}; splits are train, train_only, restval, val, test")

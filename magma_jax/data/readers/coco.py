"""Captions in COCO's formats: the annotation files of 2014 and 2017, Karpathy's split, NoCaps."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from magma_jax.data.readers.common import PictureFolder, field, metadata, read_json
from magma_jax.data.records import DataError, Record, Skipped

IMAGE_FIELDS = ("width", "height", "domain", "open_images_id", "coco_url", "license")


def read_coco(source: Path, images: Path) -> Iterator[Record | Skipped]:
    """``captions_val2014.json`` and the like, NoCaps included (its ``domain`` goes to the metadata).

    One record a picture, captions in the order of the file, joined by ``image_id``.
    """
    content = read_json(source)
    pictures = PictureFolder(images)
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in field(content, "annotations", str(source)):
        captions[field(entry, "image_id", str(source))].append(field(entry, "caption", str(source)).strip())
    for image in field(content, "images", str(source)):
        key, name = field(image, "id", str(source)), field(image, "file_name", str(source))
        said = tuple(captions.pop(key, ()))
        found = pictures.find(name)
        if found is None:
            yield Skipped(str(key), "picture missing")
        elif not said:
            yield Skipped(str(key), "picture without an annotation")
        else:
            yield Record(str(key), found, said, metadata={"file_name": name} | metadata(image, IMAGE_FIELDS))
    for key in captions:
        yield Skipped(str(key), "annotation of a picture that the file does not list")


def read_karpathy(source: Path, images: Path, *, split: str = "train") -> Iterator[Record | Skipped]:
    """Karpathy's ``dataset_coco.json``: captions of COCO 2014 in other splits.

    Args:
        source: the file.
        images: folder with ``train2014/`` and ``val2014/``.
        split: ``train`` (with ``restval``, as everyone trains on it), ``train_only``, ``restval``, ``val``, ``test``.
    """
    splits = {"train": ("train", "restval"), "train_only": ("train",)}.get(split, (split,))
    pictures = PictureFolder(images)
    found_any = False
    for image in field(read_json(source), "images", str(source)):
        if field(image, "split", str(source)) not in splits:
            continue
        found_any = True
        name = field(image, "filename", str(source))
        key = str(image.get("cocoid", image.get("imgid")))
        captions = tuple(field(s, "raw", str(source)).strip() for s in field(image, "sentences", str(source)))
        picture = pictures.find(f"{image.get('filepath', '')}/{name}", name)
        if picture is None:
            yield Skipped(key, "picture missing")
        elif not captions:
            yield Skipped(key, "picture without an annotation")
        else:
            yield Record(key, picture, captions, metadata={"file_name": name} | metadata(image, ("split", "filepath")))
    if not found_any:
        raise DataError(f"{source}: no picture of split {split!r}; splits are train, train_only, restval, val, test")

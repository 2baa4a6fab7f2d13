"""Readers of public datasets in their released formats, by name.

``reader(source, images, **options)`` yields ``Record`` or ``Skipped``, in an order that depends only on the files. An
unusable file raises ``DataError``; ``read`` converts other exceptions to it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from magma_jax.data.format.records import DataError, Record, Skipped
from magma_jax.data.readers.coco import read_coco, read_karpathy
from magma_jax.data.readers.folders import read_folder, read_magma, read_tfds
from magma_jax.data.readers.gcompris import read_gcompris
from magma_jax.data.readers.openmoji import read_openmoji
from magma_jax.data.readers.questions import read_gqa, read_hateful_memes, read_snli_ve, read_vizwiz, read_vqa
from magma_jax.data.readers.regions import read_localized_narratives, read_visual_genome
from magma_jax.data.readers.tables import read_llava, read_table
from magma_jax.data.readers.web import read_cc3m, read_cc12m, read_img2dataset, read_laion, read_wit

Reader = Callable[..., Iterator[Record | Skipped]]

READERS: dict[str, Reader] = {
    "coco": read_coco,
    "coco_karpathy": read_karpathy,
    "nocaps": read_coco,
    "vqav2": read_vqa,
    "okvqa": read_vqa,
    "gqa": read_gqa,
    "vizwiz": read_vizwiz,
    "snli_ve": read_snli_ve,
    "hateful_memes": read_hateful_memes,
    "visual_genome": read_visual_genome,
    "localized_narratives": read_localized_narratives,
    "cc3m": read_cc3m,
    "cc12m": read_cc12m,
    "laion": read_laion,
    "wit": read_wit,
    "img2dataset": read_img2dataset,
    "tfds": read_tfds,
    "magma": read_magma,
    "folder": read_folder,
    "table": read_table,
    "llava": read_llava,
    "openmoji": read_openmoji,
    "gcompris": read_gcompris,
}

# Formats that contain their images or say where they are, so that no image folder is needed.
SELF_CONTAINED = frozenset({"img2dataset", "tfds", "magma", "folder", "table", "openmoji", "gcompris"})


def read(name: str, source: Path, images: Path | None = None, **options: Any) -> Iterator[Record | Skipped]:
    """Yields the entries of a dataset in the format ``name``.

    Raises:
        DataError: the files are missing, damaged or in another format; one line that names the file.
    """
    try:
        yield from READERS[name](source, images, **options)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{error.filename or source}: cannot be read ({error.strerror or error})") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source}: is not in the format {name} ({type(error).__name__}: {reason:.200})") from error

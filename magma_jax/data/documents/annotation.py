"""Annotations: which documents of a memory were retrieved for every sample, by their ids.

A folder with ``annotation.json``, which says how they were found, and ``part-00000.jsonl`` and so on with one line per
sample: ``{"id": "...", "documents": ["...", ...], "scores": [...]}``, best first. ``python -m magma_jax.retrieval
annotate`` writes it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.data.format.records import DataError
from magma_jax.foreign import ForeignError, parse_json, read_json, read_text
from magma_jax.typing import Int

ANNOTATION_FILE = "annotation.json"


@dataclasses.dataclass(frozen=True)
class Annotation:
    """A read annotation.

    Attributes:
        folder: where it is from.
        documents: ids of the documents of every sample, by the sample's id.
        about: contents of ``annotation.json``.
    """

    folder: Path
    documents: Mapping[str, tuple[str, ...]]
    about: Mapping[str, Any]

    def rows(self, samples: Sequence[str], memory: Mapping[str, int]) -> list[Int[np.ndarray, " K"]]:
        """The rows of the documents of every sample, in the order of ``samples``.

        Args:
            samples: ids of the samples.
            memory: row of every document by its id.

        Raises:
            DataError: a sample that was not annotated, or a document that the memory lacks.
        """
        return [self._rows(sample, memory) for sample in samples]

    def _rows(self, sample: str, memory: Mapping[str, int]) -> Int[np.ndarray, " K"]:
        found = self.documents.get(sample)
        if found is None:
            raise DataError(f"{self.folder}: has no documents of sample {sample!r}; annotate the data set that you use")
        if missing := [one for one in found if one not in memory]:
            raise DataError(
                f"{self.folder}: sample {sample!r} names document {missing[0]!r}, which the memory lacks; annotate "
                "again with this memory"
            )
        return np.array([memory[one] for one in found], np.int32)


def part_file(folder: Path, number: int) -> Path:
    """File of part ``number`` of an annotation."""
    return folder / f"part-{number:05d}.jsonl"


def format_part(samples: Sequence[str], documents: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]) -> str:
    """Contents of a part."""
    lines = [
        json.dumps({"id": sample, "documents": list(found), "scores": [round(float(score), 6) for score in values]})
        for sample, found, values in zip(samples, documents, scores, strict=True)
    ]
    return "".join(f"{line}\n" for line in lines)


def open_annotation(folder: str | Path) -> Annotation:
    """Reads an annotation.

    Raises:
        DataError: no such folder, one that is not complete, or an unreadable line.
    """
    folder = Path(folder).expanduser()
    try:
        about = read_json(folder / ANNOTATION_FILE)
        parts = int(about["parts"])
    except (OSError, ForeignError, KeyError, TypeError, ValueError):
        raise DataError(
            f"{folder}: no annotation; write it with python -m magma_jax.retrieval annotate, or finish that"
        ) from None
    documents: dict[str, tuple[str, ...]] = {}
    for number in range(parts):
        file = part_file(folder, number)
        try:
            for line in read_text(file).splitlines():
                entry = parse_json(line)
                documents[str(entry["id"])] = tuple(str(one) for one in entry["documents"])
        except (OSError, ForeignError, KeyError, TypeError) as error:
            raise DataError(f"{file}: cannot be read ({error}); annotate again") from None
    return Annotation(folder, documents, about)

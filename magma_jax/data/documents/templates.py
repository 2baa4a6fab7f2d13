"""Templates of documents: how texts and images of a sample follow each other.

    {text} | {image}
    Question: {question} Answer: {answer}. | {image}
    Edit first image following the instruction | {source} | {instruction} | {image}

Segments are parted by ``|``, which becomes ``<break>``. A segment is a text with fields in braces, or one image field
alone. Texts come before images (table 5 of CM3Leon): with the CM3 objective a model learns to fill in either.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from magma_jax.data.format.records import DataError

# Fields that hold an image.
IMAGES = ("image", "source")

_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")

# Table 5 of CM3Leon; fields are those of a sample.
TEMPLATES = {
    "pair": "{text} | {image}",
    "caption": "Describe the given picture. {text} | {image}",
    "paragraph": "Describe all the objects in the given image in very detail. {text} | {image}",
    "question": "Question: {question} Answer: {answer}. | {image}",
    "question_lines": "Question: {question}\n{answer} | {image}",
    "question_is": "Question: {question} The answer is {answer}. | {image}",
    "science": "Question: {question} Context: {context} Options: {options} Answer: {answer}. | {image}",
    "science_steps": "Question: {question} Context: {context} Options: {options} Let's think step-by-step: "
    "{explanation} So the answer is {answer}. | {image}",
    "edit": "Edit first image following the instruction | {source} | {instruction} | {image}",
    "ocr": 'draw "{text}" | {image}',
    "grounded": "Generate high quality image of {text} with segmentations {objects} | {image}",
    "structure": "Make high quality image from {features} | {source} | {text} | {image}",
}


@dataclasses.dataclass(frozen=True)
class Template:
    """A parsed template; its segments are texts with fields, or names of image fields."""

    segments: tuple[str, ...]

    @functools.cached_property
    def fields(self) -> frozenset[str]:
        """Names of all fields."""
        return frozenset(name for segment in self.segments for name in _FIELD.findall(segment))

    def fill(self, fields: Mapping[str, Any], where: str) -> list[str | np.ndarray]:
        """The texts and image codes of a sample, in order.

        Args:
            fields: texts and codes by name.
            where: name of the sample, for messages.

        Raises:
            DataError: a field that the sample lacks.
        """
        if missing := sorted(self.fields - fields.keys()):
            known = ", ".join(sorted(fields))
            raise DataError(f"{where} has no field {missing[0]!r}, which the template asks for; it has {known}")
        parts: list[str | np.ndarray] = []
        for segment in self.segments:
            image = _FIELD.fullmatch(segment)
            if image and image[1] in IMAGES:
                parts.append(np.asarray(fields[image[1]]))
            else:
                parts.append(_FIELD.sub(lambda match: str(fields[match[1]]), segment))
        return parts


def parse_template(text: str) -> Template:
    """Parses a template, or the name of one of ``TEMPLATES``.

    Raises:
        ValueError: an empty segment, unbalanced braces, or an image amid a text.
    """
    segments = tuple(segment.strip(" ") for segment in TEMPLATES.get(text, text).split("|"))
    for segment in segments:
        if not segment:
            raise ValueError(f"template {text!r}: a segment is empty; write a text or an image field on each side of |")
        rest = _FIELD.sub("", segment)
        if "{" in rest or "}" in rest:
            raise ValueError(f"template {text!r}: braces hold the name of a field, as in {{text}}")
        images = [name for name in _FIELD.findall(segment) if name in IMAGES]
        if images and not _FIELD.fullmatch(segment):
            raise ValueError(f"template {text!r}: the image {images[0]} is a segment of its own; part it by |")
    return Template(segments)

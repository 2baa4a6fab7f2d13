"""The questions: a drawing's name, the beginning of a sentence, and the words that may end it.

``openmoji.json`` has a record a kind: ``prompt``, which follows the image; ``answers``, the names of drawings by the
word that is right for them; ``source`` of these facts. Within a kind every answer is equally frequent.
"""

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

FILE = "evaluation/knowledge/openmoji.json"


class KnowledgeError(ValueError):
    """Questions that cannot be asked; one line with the reason."""


class Question(NamedTuple):
    """One question.

    Attributes:
        kind: kind of question.
        image: row of its drawing.
        name: caption of the drawing.
        prompt: text after the image.
        choices: words that may follow.
        answer: index of the right one.
    """

    kind: str
    image: int
    name: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


def questions(records: Sequence[Any]) -> list[Question]:
    """All questions about the drawings of a dataset, see ``data.openmoji.drawings``.

    Raises:
        KnowledgeError: drawings that the questions are about are missing, or other records.
    """
    drawn = {getattr(record, "base", ""): record for record in records if getattr(record, "kind", "") in _KINDS}
    found = []
    for kind, entry in json.loads((resources.files("magma_jax") / FILE).read_text(encoding="utf-8")).items():
        choices = tuple(entry["answers"])
        for number, names in enumerate(entry["answers"].values()):
            if missing := [name for name in names if name not in drawn]:
                raise KnowledgeError(f"the run's data has no drawing of {missing[0]!r}; questions are about OpenMoji's")
            found += [
                Question(kind, drawn[name].index, drawn[name].caption, entry["prompt"], choices, number)
                for name in names
            ]
    return found


# Drawings of people have tones and genders, which the questions are not about.
_KINDS = ("thing", "flag")

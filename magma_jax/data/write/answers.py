"""The commonest answers of a dataset folder: the classes of a model that answers questions by classification."""

import collections
import json
from pathlib import Path

from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError
from magma_jax.output import replace_file


def common_answers(folder: str | Path, count: int) -> list[str]:
    """The ``count`` commonest answers, each question counted once with its most frequent one; ties by name.

    Raises:
        DataError: no dataset folder, or one without answers.
    """
    records = StoredRecords(folder)
    found: collections.Counter[str] = collections.Counter()
    for row in range(len(records)):
        for question in records.text(row).questions:
            answers = [answer.strip() for answer in question.answers if answer.strip()]
            if answers:
                found[collections.Counter(answers).most_common(1)[0][0]] += 1
    if not found:
        raise DataError(f"{folder}: has no questions with answers")
    return sorted(found, key=lambda answer: (-found[answer], answer))[:count]


def write_answers(folder: str | Path, out: Path, count: int) -> list[str]:
    """Writes the commonest answers as a JSON array, and returns them; raises as ``common_answers``."""
    if count < 2:
        raise DataError(f"--count must be at least 2, got {count}")
    answers = common_answers(folder, count)
    replace_file(out, (json.dumps(answers, ensure_ascii=False, indent=0) + "\n").encode())
    return answers

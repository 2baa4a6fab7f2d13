"""Helpers of all Python clients' checks; each check prints a line of JSON, see ``benchmarks/clients.py``.

A check's script takes the base URL of a server, the name of its model and a folder of held-out questions.
"""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL, MODEL, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
SHORT = "\nAnswer the question using a single word or phrase."
YES_OR_NO = "\nPlease answer yes or no."


def questions() -> list[dict]:
    """Held-out questions: path of the ``image``, ``question``, ``answer``."""
    found = json.loads((FOLDER / "questions.json").read_text())
    return [row | {"picture": str(FOLDER / row["picture"])} for row in found]


def worded(row: dict) -> str:
    """A question in the wording of VLMEvalKit and lmms-eval."""
    return row["question"] + (YES_OR_NO if row["answer"] in ("yes", "no") else SHORT)


def data_uri(path: str) -> str:
    """An image as a data: URI."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def content(row: dict) -> list[Any]:
    """A question and its image as the parts of a message."""
    return [
        {"type": "text", "text": worded(row)},
        {"type": "image_url", "image_url": {"url": data_uri(row["picture"])}},
    ]


def run(checks: dict[str, Callable[[], object]]) -> None:
    """Runs every check and prints its result; a check fails if it raises or returns nothing."""
    for name, check in checks.items():
        try:
            says = check()
            tell(name, bool(says), says)
        except Exception as error:  # any error of a client is a result
            tell(name, False, f"{type(error).__name__}: {error}")


def tell(name: str, ok: bool, says: object) -> None:
    """Prints the result of a check."""
    print(json.dumps({"check": name, "ok": ok, "says": str(says)[:300]}), flush=True)


def tell_answers(answers: list[str]) -> None:
    """Prints how many of ``questions()`` were answered, and how many correctly."""
    rows = questions()
    right = sum(a.strip().rstrip(".").lower() == row["answer"].lower() for a, row in zip(answers, rows, strict=True))
    there = sum(bool(answer.strip()) for answer in answers)
    tell("harness questions", there == len(rows), f"{there} of {len(rows)} answered, {right} right")

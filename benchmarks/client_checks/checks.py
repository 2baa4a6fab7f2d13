"""What the checks of all Python clients share; each prints a line of JSON, see ``benchmarks/clients.py``.

A check's file is run with the base URL of a server, the name of its model and a folder of held-out questions.
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
    """A question as VLMEvalKit and lmms-eval ask it."""
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
    """Runs every check and prints how it ended; one fails by raising or by giving nothing."""
    for name, check in checks.items():
        try:
            says = check()
            tell(name, bool(says), says)
        except Exception as error:  # whatever a client raises is the result
            tell(name, False, f"{type(error).__name__}: {error}")


def tell(name: str, ok: bool, says: object) -> None:
    """Prints how a check ended."""
    print(json.dumps({"check": name, "ok": ok, "says": str(says)[:300]}), flush=True)


def tell_answers(answers: list[str]) -> None:
    """Prints how many answers to ``questions()`` are there, and right."""
    rows = questions()
    right = sum(a.strip().rstrip(".").lower() == row["answer"].lower() for a, row in zip(answers, rows, strict=True))
    there = sum(bool(answer.strip()) for answer in answers)
    tell("harness questions", there == len(rows), f"{there} of {len(rows)} answered, {right} right")

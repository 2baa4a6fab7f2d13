"""Instructor: answers as objects."""

import instructor  # pyright: ignore[reportMissingImports]  # installed in its own environment
import openai
from checks import MODEL, URL, content, questions, run
from pydantic import BaseModel

ASKED = {"role": "user", "content": content(questions()[0])}


class Seen(BaseModel):
    """Schema of an answer."""

    hand: bool


def ask(mode: instructor.Mode) -> Seen:
    """An object, without retries."""
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none", max_retries=0), mode=mode)
    return client.chat.completions.create(model=MODEL, response_model=Seen, messages=[ASKED], max_retries=0)


run(
    {
        "structured: JSON_SCHEMA": lambda: ask(instructor.Mode.JSON_SCHEMA),
        "structured: JSON": lambda: ask(instructor.Mode.JSON),
    }
)

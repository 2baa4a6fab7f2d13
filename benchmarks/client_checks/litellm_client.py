"""LiteLLM."""

import litellm  # pyright: ignore[reportMissingImports]  # installed in its own environment
from checks import MODEL, URL, content, questions, run

ASKED = {"role": "user", "content": content(questions()[0])}
WHERE = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none"}


def chat(*messages, **options):
    """One answer's message."""
    return litellm.completion(messages=list(messages) or [ASKED], **WHERE, **options).choices[0].message


def stream():
    """Text of a streamed answer."""
    chunks = litellm.completion(messages=[ASKED], stream=True, **WHERE)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def history():
    """Answers are sent back as messages, as objects and as plain values."""
    turn = chat()
    return [chat(ASKED, form, ASKED).content for form in (turn, turn.model_dump())]


run(
    {
        "question about an image": lambda: chat().content,
        "stream": stream,
        "answers as history": history,
        "max_tokens beyond the context": lambda: chat(max_tokens=4096).content,
        "text_completion": lambda: (
            litellm.text_completion(
                model=f"text-completion-openai/{MODEL}",
                prompt="A picture of",
                max_tokens=8,
                api_base=URL,
                api_key="none",
            )
            .choices[0]
            .text
        ),
        "structured: response_format": lambda: (
            chat(
                response_format={
                    "type": "json_schema",
                    "json_schema": {
                        "name": "seen",
                        "schema": {
                            "type": "object",
                            "properties": {"hand": {"type": "boolean"}},
                            "required": ["hand"],
                            "additionalProperties": False,
                        },
                    },
                }
            ).content
        ),
    }
)

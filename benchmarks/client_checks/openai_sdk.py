"""The official Python SDK."""

import asyncio

import openai
from checks import MODEL, URL, content, questions, run
from openai.types.chat import ChatCompletionUserMessageParam
from pydantic import BaseModel

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
ROW = questions()[0]
ASKED: ChatCompletionUserMessageParam = {"role": "user", "content": content(ROW)}


class Seen(BaseModel):
    """Schema of an answer."""

    hand: bool


def chat(*messages, **options):
    """One answer's message."""
    answer = client.chat.completions.create(model=MODEL, messages=list(messages) or [ASKED], **options)
    return answer.choices[0].message


def stream():
    """Text of a streamed answer, and its tokens."""
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=[ASKED], stream=True, stream_options={"include_usage": True}
        )
    )
    usage = chunks[-1].usage
    assert usage is not None
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), usage.completion_tokens


def history():
    """Answers are sent back as messages, in every form that the SDK has."""
    turn = chat()
    return [chat(ASKED, form, ASKED).content for form in (turn, turn.model_dump(), turn.to_dict())]


def parsed():
    """An answer as an object."""
    answer = client.chat.completions.parse(model=MODEL, messages=[ASKED], response_format=Seen)
    seen = answer.choices[0].message.parsed
    return seen and seen.model_dump_json()


def refused():
    """Unsupported options are rejected by name."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    try:
        chat(tools=[tool])
    except openai.BadRequestError as error:
        return error.param == "tools" and "not supported" in error.message and error.message


async def unblocked():
    """The asynchronous client."""
    async with openai.AsyncOpenAI(base_url=URL, api_key="none") as other:
        answer = await other.chat.completions.create(model=MODEL, messages=[ASKED])
    return answer.choices[0].message.content


run(
    {
        "models": lambda: client.models.retrieve(client.models.list().data[0].id).id,
        "question about an image": lambda: chat().content,
        "stream": stream,
        "asynchronous": lambda: asyncio.run(unblocked()),
        "answers as history": history,
        "fields that ask for nothing": lambda: (
            chat(
                tools=[],
                tool_choice="none",
                response_format={"type": "text"},
                logit_bias={},
                store=False,
                parallel_tool_calls=True,
                modalities=["text"],
                service_tier="auto",
                metadata={"a": "b"},
                verbosity="medium",
                reasoning_effort="none",
                frequency_penalty=0,
                stop=None,
                seed=None,
                extra_body={"top_k": -1},
            ).content
        ),
        "field that asks for something": refused,
        "max_tokens beyond the context": lambda: chat(max_tokens=4096).content,
        "completions": lambda: (
            client.completions.create(model=MODEL, prompt="A picture of", max_tokens=8).choices[0].text
        ),
        "completions, stream": lambda: "".join(
            chunk.choices[0].text
            for chunk in client.completions.create(model=MODEL, prompt="A picture of", max_tokens=8, stream=True)
        ),
        "structured: parse": parsed,
    }
)

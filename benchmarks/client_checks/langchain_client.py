"""LangChain's ChatOpenAI and OpenAI."""

import asyncio

from checks import MODEL, URL, content, questions, run
from langchain_core.messages import HumanMessage, SystemMessage  # pyright: ignore[reportMissingImports]  # installed in its own environment
from langchain_openai import ChatOpenAI, OpenAI  # pyright: ignore[reportMissingImports]  # installed in its own environment
from pydantic import BaseModel

ASKED = HumanMessage(content(questions()[0]))
SYSTEM = SystemMessage("You are a helpful assistant.")
chat = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", max_retries=0)


class Seen(BaseModel):
    """Schema of an answer."""

    hand: bool


run(
    {
        "invoke": lambda: chat.invoke([SYSTEM, ASKED]).content,
        "stream": lambda: "".join(chunk.content for chunk in chat.stream([ASKED])),
        "ainvoke": lambda: asyncio.run(chat.ainvoke([ASKED])).content,
        "batch": lambda: [answer.content for answer in chat.batch([[ASKED]] * 4)],
        "answers as history": lambda: chat.invoke([ASKED, chat.invoke([ASKED]), ASKED]).content,
        "completions": lambda: OpenAI(model=MODEL, base_url=URL, api_key="none", max_tokens=8).invoke("A picture of"),
        "structured: with_structured_output": lambda: chat.with_structured_output(Seen).invoke([ASKED]),
    }
)

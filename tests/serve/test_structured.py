"""Answers of a given form through the socket: OpenAI's client and its schemas, vLLM's fields, what is refused."""

import json
import threading
from enum import Enum
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from magma_jax.inference.pending import UnfinishedError
from magma_jax.serve.config import ServerConfig
from tests.compilations import count_compilations
from tests.serve.running import RULES, Running, user


class Tone(Enum):
    light = "light"
    dark = "dark"


class Answer(BaseModel):
    tone: Tone
    sure: bool
    counts: list[Literal[1, 2, 3]] = Field(max_length=2)


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
CHOICES = ["red", "green", "dark blue"]


@pytest.fixture(scope="module")
def running(model):
    running = Running(model, ServerConfig("tiny", images=RULES))
    running.chat(guided_choice=["a"])  # the library is loaded
    yield running
    running.stop()


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def content(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_the_official_client_parses_what_it_asked_for(client):
    options = {"model": "tiny", "messages": user("a red"), "max_tokens": 50, "response_format": Answer}
    for temperature in (0, 2):
        answer = client.chat.completions.parse(**options, temperature=temperature, n=3, seed=5, logprobs=True)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, Answer)
            spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode()
            assert spelled.removeprefix(" ") == choice.message.content
    with client.chat.completions.stream(**options, temperature=2, seed=5) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message == answer.choices[0].message
    assert kinds.count("content.delta") > 3


def test_an_answer_that_is_cut_says_so(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=user("a"), max_tokens=3, response_format=Answer)


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        ({"guided_json": SCHEMA}, lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": SCHEMA, "strict": None},
                }
            },
            lambda text: jsonschema.validate(json.loads(text), SCHEMA),
        ),
        ({"guided_choice": CHOICES, "guided_json": None}, CHOICES.index),
        ({"structured_outputs": {"choice": CHOICES, "regex": None, "disable_any_whitespace": True}}, CHOICES.index),
        ({"guided_regex": "[0-9]{3}", "response_format": {"type": "text"}}, lambda text: [int(text)][len(text) - 3]),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, lambda text: [int(text)][len(text) - 3]),
    ],
)
def test_every_way_to_ask(running, asked, right):
    for temperature in (0, 2):
        right(content(running.chat(messages=user("a red"), max_tokens=30, temperature=temperature, **asked)))


def test_texts_are_continued_in_a_form_too(running):
    answer = running.post("/v1/completions", prompt=["a", "b"], guided_choice=CHOICES, max_tokens=20, temperature=2)
    assert answer.status_code == 200, answer.text
    assert all(choice["text"] in CHOICES for choice in answer.json()["choices"])


def test_a_space_of_the_choice_itself_stays(running):
    assert content(running.chat(guided_choice=[" red"], template="qa")) == " red"
    assert content(running.chat(guided_choice=["red"], template="raw", temperature=9)) == "red"


def test_any_object_and_any_text(running):
    for asked in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        assert content(running.chat(max_tokens=20, **asked)).startswith("{")
    plain = content(running.chat(max_tokens=20))
    assert content(running.chat(max_tokens=20, response_format={"type": "text"})) == plain


@pytest.mark.parametrize(
    ("asked", "field", "says"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format", "'yaml' is not supported"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "Field required",
        ),
        ({"guided_json": [1]}, "guided_json", "a schema is an object, not [1]"),
        ({"guided_json": 3}, "guided_json", "a schema is an object, not 3"),
        ({"guided_json": {"type": "colour"}}, "guided_json", "guided_json: Invalid type: colour"),
        ({"guided_grammar": "start: 'a'"}, "guided_grammar", "not supported: JSON schemas, choices and"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, json_object, choice and regex"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "not supported"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_regex", "guided_choice and guided_regex: an answer"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "none of them empty"),
    ],
)
def test_what_is_refused_names_its_field(running, asked, field, says):
    response = running.chat(**asked)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(field)
    assert says in error["message"]
    assert "\n" not in error["message"]


def test_nothing_compiles_for_a_form(running):
    with count_compilations() as compiled:
        for asked in ({"guided_choice": CHOICES}, {"guided_json": SCHEMA, "logprobs": True, "top_logprobs": 2}):
            content(running.chat(max_tokens=20, **asked))
    assert compiled.count == 0


def test_others_are_answered_while_a_schema_is_compiled(running, monkeypatch):
    compiling, go_on = threading.Event(), threading.Event()
    compile_ = running.engine.compile

    def slow(constraint):
        compiling.set()
        assert go_on.wait(60)
        return compile_(constraint)

    monkeypatch.setattr(running.engine, "compile", slow)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(running.chat(guided_choice=CHOICES, max_tokens=20)))
    asking.start()
    try:
        assert compiling.wait(60)
        assert running.chat(max_tokens=2).status_code == 200
        assert running.http.get("/health").status_code == 200
    finally:
        go_on.set()
        asking.join()
    assert content(answers[0]) in CHOICES


def test_a_grammar_that_grows_too_large_is_the_clients_fault(running, monkeypatch):
    def fail(ticket, start=0):
        raise UnfinishedError("the answer cannot continue under its constraint (too many states)")

    monkeypatch.setattr("magma_jax.inference.batching.requests.Ticket.pieces", fail)
    response = running.chat(guided_choice=CHOICES)
    assert response.status_code == 400
    assert "too many states" in response.json()["error"]["message"]

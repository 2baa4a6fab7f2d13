"""The server through its socket: the official client, streams, limits, and what hostile requests get."""

import dataclasses
import http.client
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from magma_jax.data.images import ImageInput
from magma_jax.inference.attention_maps import attention_maps
from magma_jax.serve.config import ServerConfig
from tests.compilations import count_compilations
from tests.serve.running import RULES, SIZES, Running, expected, square, user


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_gets_what_python_gives(client, model):
    messages = user(square("red"), "A picture of")
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected(model, square("red"), "A picture of")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion"
    assert [entry.id for entry in client.models.list()] == ["tiny"]


def test_the_official_client_streams(client, model):
    stream = client.chat.completions.create(
        model="tiny",
        messages=user("A ", square("blue"), " and"),
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(model, "A ", square("blue"), " and")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 0


def test_several_choices_logprobs_seeds_and_stop_texts(client):
    options = {"model": "tiny", "messages": user("a red"), "max_tokens": 8, "temperature": 1.5}
    first = client.chat.completions.create(**options, n=3, seed=7, logprobs=True, top_logprobs=2)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    again = client.chat.completions.create(**options, seed=8)
    assert again.choices[0].message.content == texts[1]
    entries = first.choices[0].logprobs.content
    assert entries
    assert bytes(b for entry in entries for b in entry.bytes).decode(errors="replace") == texts[0]
    assert all(entry.logprob <= 0 for entry in entries)
    for entry in entries:
        likeliest, next_one = (other.logprob for other in entry.top_logprobs)
        assert likeliest >= max(next_one, entry.logprob)
    whole = max(texts, key=len)
    seed = 7 + texts.index(whole)
    cut = client.chat.completions.create(**options, seed=seed, stop=[whole[2:4]])
    assert cut.choices[0].message.content == whole[: whole.index(whole[2:4])]
    assert cut.choices[0].finish_reason == "stop"


def test_without_a_seed_each_answer_is_drawn_anew(client):
    options = {"model": "tiny", "messages": user("a red"), "max_tokens": 20, "temperature": 5.0}

    def text(**more):
        return client.chat.completions.create(**options, **more).choices[0].message.content

    assert len({text() for _ in range(4)}) > 1
    for seed in (-(2**63), 2**63 - 1):
        assert len({text(seed=seed) for _ in range(3)}) == 1
    # The choices of one request have neighbouring seeds, whatever the first is.
    both = client.chat.completions.create(**options, n=2, seed=-1).choices
    assert [choice.message.content for choice in both] == [text(seed=-1), text(seed=0)]


def test_what_one_has_asked_is_told_to_those_of_one_salt_only(server):
    def cached(**body):
        usage = server.chat(messages=user("one two three four five six seven"), max_tokens=1, **body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"] > 0

    cached()
    assert cached()
    assert [cached(cache_salt="mine"), cached(cache_salt="mine"), cached(cache_salt="hers")] == [False, True, False]


def test_tokens_at_least_and_what_is_refused_of_them(server):
    answer = server.chat(max_tokens=9, min_tokens=9, temperature=9.0)
    assert answer.json()["usage"]["completion_tokens"] == 9
    refused = server.chat(max_tokens=3, min_tokens=4)
    assert (refused.status_code, "min_tokens 4 is more than" in refused.text) == (400, True)


def test_turns_are_a_few_shot_prompt(server, model):
    question = "Q: What colour? A:"
    messages = [
        *user(square("red"), question),
        {"role": "assistant", "content": "red"},
        *user(square("blue"), question),
    ]
    response = server.chat(messages=messages, max_tokens=4)
    prompt = (square("red"), question + " red\n", square("blue"), question)
    assert response.json()["choices"][0]["message"]["content"] == expected(model, *prompt, steps=4)


def test_nothing_compiles_while_serving(server):
    server.warm_up()
    with count_compilations() as compiled:
        for temperature in (0.0, 0.5, 1.1):
            for text in ("a", "A picture of a red square"):
                answer = server.chat(messages=user(square("white"), text), max_tokens=3, temperature=temperature)
                assert answer.status_code == 200
                assert server.post("/v1/attention", messages=user(square("red"), text), answer="b").status_code == 200
    assert compiled.count == 0


def test_attention_is_that_of_python(server, model):
    prompt = (square("red"), "A ", square("blue"), " image of")
    messages = user(*prompt)
    answer = server.chat(messages=messages, max_tokens=6, return_token_ids=True).json()["choices"][0]
    seen = attention_maps(model, [item if isinstance(item, str) else ImageInput(item) for item in prompt], max_steps=6)
    assert tuple(answer["token_ids"]) == seen.tokens
    for which in ({}, {"layer": 1}, {"layer": 0, "head": 1, "relative": True}):
        found = server.post("/v1/attention", messages=messages, answer=answer["token_ids"], **which).json()
        assert [word["text"] for word in found["words"]] == [word.text for word in seen.words]
        for i, word in enumerate(found["words"]):
            for image, cells in enumerate(word["maps"]):
                np.testing.assert_allclose(cells, seen.map(i, image=image, **which).ravel(), atol=2e-5, rtol=1e-3)
    assert found["grid"] == {"rows": 2, "columns": 2}
    assert (found["layers"], found["heads"]) == (2, 2)
    text = server.post("/v1/attention", messages=messages, answer=" a red").json()
    assert [word["text"] for word in text["words"]] == [" a", " red"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": user("a"), "answer": "b"}, "no image to look at"),
        ({"answer": ""}, "the answer is empty"),
        ({"answer": []}, "the answer is empty"),
        ({"answer": [300]}, "no such token"),
        ({"answer": [-1]}, "answer"),
        ({"answer": "b" * 500}, "the context holds 64"),
        ({"answer": "b", "layer": 2}, "the model has 2, counted from 0"),
        ({"answer": "b", "layer": 0, "head": 9}, "the model has 2, counted from 0"),
        ({"answer": "b", "head": 0}, "give layer too"),
        ({}, "answer: Field required"),
    ],
)
def test_attention_that_cannot_be_shown(server, body, says):
    response = server.post("/v1/attention", **{"messages": user(square("red"), "a"), **body})
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]["message"]


def test_health_metrics_and_the_page(server):
    assert server.http.get("/health").json() == {"status": "ok"}
    server.http.get("/no/such/place")
    text = server.http.get("/metrics").text
    assert 'magma_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'route="other",status="404"' in text
    kinds = dict(re.findall(r"^# TYPE magma_(\w+) (\w+)$", text, re.MULTILINE))
    totals = "finished prompt_tokens reused_tokens new_tokens images_encoded programs compilations"
    assert {kinds[f"{name}_total"] for name in totals.split()} == {"counter"}
    assert {kinds["waiting"], kinds["running"]} == {"gauge"}
    assert f"magma_new_tokens_total {float(server.engine.stats().new_tokens)}" in text
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert server.http.get("/nothing").json()["error"]["message"] == "no such route: GET /nothing"


def test_a_client_that_leaves_frees_its_slot(server):
    body = json.dumps({"messages": user("a"), "max_tokens": 60, "temperature": 50.0, "stream": True}).encode()
    before = server.engine.stats().finished
    for _ in range(6):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and server.engine.stats()[:2] != (0, 0):
        time.sleep(0.02)
    assert server.engine.stats()[:2] == (0, 0)
    assert server.engine.stats().finished >= before
    assert server.chat(max_tokens=2).status_code == 200


def test_a_key_is_asked_for_on_every_route_but_health(model):
    config = ServerConfig(model="tiny", api_key="s\u00e9cret", images=RULES)
    running = Running(model, config)
    try:
        assert running.http.get("/health").status_code == 200  # it alone is open
        for route in ("/", "/metrics", "/v1/models", "/nothing"):
            assert running.http.get(route).status_code == 401
            assert running.http.get(route, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert running.http.get(route, headers={"Authorization": "Basic !!!"}).status_code == 401
        response = running.chat()
        assert response.json()["error"]["message"] == "wrong or missing API key"
        assert "Basic" in response.headers["www-authenticate"]
        bearer = {"Authorization": "Bearer s\u00e9cret".encode()}
        assert running.http.get("/metrics", headers=bearer).status_code == 200
        assert running.http.get("/", auth=("anyone", "s\u00e9cret")).status_code == 200
    finally:
        running.stop()


def test_requests_that_cannot_be_served_now(model, monkeypatch):
    """A full queue, slow answers, slow images, slow attention, an engine that has stopped."""
    sizes = dataclasses.replace(SIZES, slots=1, queue=3)
    running = Running(model, ServerConfig(model="tiny", timeout=0.5, images=RULES), sizes)

    def codes(route, count, **body):
        with ThreadPoolExecutor(count) as threads:
            return sorted(threads.map(lambda _: running.post(route, **body).status_code, range(count)))

    chat = {"messages": user("a")}
    looked = {"messages": user(square("red"), "a"), "answer": "b"}
    try:
        with monkeypatch.context() as patch:
            patch.setattr("magma_jax.serve.service.attention", lambda *_: time.sleep(1.5))
            assert codes("/v1/attention", 1, **looked) == [504]
        with monkeypatch.context() as patch:
            patch.setattr(running.engine, "failure", "the engine has stopped (broken); restart it")
            assert running.http.get("/health").status_code == 503
            assert codes("/v1/chat/completions", 1, **chat) == [503]
        with running.engine.paused():
            assert codes("/v1/chat/completions", 5, **chat) == [429, 429, 504, 504, 504]
            while running.engine.stats().waiting:  # those that timed out
                time.sleep(0.01)
        monkeypatch.setattr("magma_jax.serve.prompts.images.read_image", lambda *_: time.sleep(1.5))
        assert codes("/v1/chat/completions", 5, messages=user(square("red"))) == [429, 429, 504, 504, 504]
    finally:
        running.stop()

"""Routes beside chat completions: texts, models, methods; what streams count; templates and limits by request."""

import json

import openai
import pytest

from tests.serve.running import expected, square, user


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_answers_of_the_sdk_go_back_in(client):
    first = {"role": "user", "content": "ab"}
    turn = client.chat.completions.create(model="tiny", messages=[first], max_tokens=4).choices[0].message
    assert turn.refusal is None
    for form in (turn, turn.model_dump(), turn.to_dict()):
        again = client.chat.completions.create(model="tiny", messages=[first, form, first], max_tokens=4)
        assert again.usage.completion_tokens <= 4


def test_a_text_is_continued(client, model):
    options = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(prompt="A picture of", **options)
    assert (whole.object, whole.id[:5]) == ("text_completion", "cmpl-")
    assert whole.choices[0].text == expected(model, "A picture of")
    chunks = list(client.completions.create(prompt="A picture of", stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    ids = client.completions.create(prompt=model.tokenizer.encode("A picture of"), **options)
    assert ids.choices[0].text == whole.choices[0].text
    assert ids.usage.prompt_tokens == whole.usage.prompt_tokens


def test_several_texts_and_choices_of_each(client):
    options = {"model": "tiny", "max_tokens": 4, "temperature": 1.0, "seed": 3, "logprobs": 2}
    both = client.completions.create(prompt=["a red", "b"], n=2, echo=False, **options)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    alone = client.completions.create(prompt="b", n=2, **options)
    assert [choice.text for choice in both.choices[2:]] == [choice.text for choice in alone.choices]
    prompts = [client.completions.create(prompt=p, **options).usage.prompt_tokens for p in ("a red", "b")]
    assert both.usage.prompt_tokens == sum(prompts)
    for choice in both.choices:
        logs = choice.logprobs
        assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == len(logs.text_offset)
        assert logs.text_offset == [sum(map(len, logs.tokens[:i])) for i in range(len(logs.tokens))]


def test_echo_and_images_as_an_addition(client, server, model):
    (message,) = user(square("red"), "A picture of")
    told = client.completions.create(model="tiny", prompt=message["content"], max_tokens=12, echo=True)
    assert told.choices[0].text == "A picture of" + expected(model, square("red"), "A picture of")
    stream = client.completions.create(model="tiny", prompt="ab", max_tokens=3, echo=True, stream=True)
    assert next(iter(stream)).choices[0].text == "ab"
    refused = server.post("/v1/completions", prompt=[10**6])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert "the vocabulary has" in refused.text


def test_streams_count_as_they_are_asked_to(server):
    def used(**options):
        response = server.chat(max_tokens=6, min_tokens=6, temperature=9.0, stream=True, stream_options=options)
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        return [json.loads(line) for line in lines]

    assert all("usage" not in chunk for chunk in used())
    *chunks, last = used(include_usage=True)
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 6)
    *chunks, last = used(include_usage=True, continuous_usage_stats=True)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], last["usage"]["completion_tokens"]) == (0, 6, 6)


def test_the_end_of_text_is_ignored(server):
    answer = server.chat(max_tokens=9, ignore_eos=True)
    assert answer.json()["usage"]["completion_tokens"] == 9


def test_a_request_names_its_template(server, model):
    messages = [{"role": "system", "content": "Be helpful."}, *user(square("red"), "Which?\nAnswer with a word.")]
    told = server.chat(messages=messages, max_tokens=6, template="qa").json()["choices"][0]["message"]["content"]
    assert told == expected(model, square("red"), "Q: Which? A:", steps=6).lstrip()
    streamed = server.chat(messages=messages, max_tokens=6, template="qa", stream=True).text
    first = expected(model, square("red"), "Q: Which? A:", steps=6)
    assert streamed.count("data: ") > 2 or not first
    refused = server.chat(template="none such")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "template")
    looked = server.post("/v1/attention", messages=messages, template="qa", answer=" a red")
    assert [word["text"] for word in looked.json()["words"]] == [" a", " red"]


def test_one_model_by_its_name(client, server):
    assert client.models.retrieve("tiny").id == "tiny"
    for name in ("other", "a/b", "tiny/"):
        response = server.http.get(f"/v1/models/{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("route", ["/", "/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_head_is_get_without_a_body(server, route):
    whole, head = server.http.get(route), server.http.head(route)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.parametrize(
    ("method", "route", "status", "allowed"),
    [
        ("OPTIONS", "/v1/chat/completions", 204, "POST, OPTIONS"),
        ("OPTIONS", "/v1/models/tiny", 204, "GET, HEAD, OPTIONS"),
        ("OPTIONS", "/nothing", 404, None),
        ("GET", "/v1/chat/completions", 405, "POST, OPTIONS"),
        ("HEAD", "/v1/completions", 405, "POST, OPTIONS"),
        ("DELETE", "/v1/models", 405, "GET, HEAD, OPTIONS"),
        ("PUT", "/", 405, "GET, HEAD, OPTIONS"),
    ],
)
def test_methods(server, method, route, status, allowed):
    response = server.http.request(method, route)
    assert (response.status_code, response.headers.get("allow")) == (status, allowed)
    if status >= 400 and method != "HEAD":
        assert method in response.json()["error"]["message"]

"""Chat answers of texts and images, through OpenAI's client."""

import base64
import io

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serve.drawing import TOKENS

IMAGE = Image.new("RGB", (8, 8), (10, 200, 30))


def uri(image=IMAGE):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(scope="module")
def client(drawing):
    with openai.OpenAI(base_url=f"{drawing.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer_of_texts_and_images(client, drawer):
    content = [{"type": "text", "text": "before"}, part(uri()), {"type": "text", "text": " after"}]
    message = {"role": "user", "content": content}
    made = client.chat.completions.create(
        model="drawer", messages=[message], n=2, max_tokens=7, temperature=0.5, top_p=0.5, seed=-3
    )
    assert [choice.index for choice in made.choices] == [0, 1]
    found = made.choices[1].message
    assert (found.role, found.content, made.choices[1].finish_reason) == ("assistant", "BEFORE AFTER", "stop")
    assert [one["type"] for one in found.parts] == ["text", "image_url", "text"]
    url = found.images[0]["image_url"]["url"]
    shown = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(IMAGE))
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (2 + TOKENS, 2 * (2 + TOKENS))
    options = drawer.drawn[-1][1]
    assert (options.max_new_tokens, options.n, options.seed) == (7, 2, -3)
    assert (options.sampling.temperature, options.sampling.top_p) == (0.5, 0.5)


def test_a_text_leaves_room_for_an_image(client, drawer):
    made = client.chat.completions.create(model="drawer", messages=[{"role": "user", "content": "red"}])
    assert made.choices[0].message.content == "RED"
    assert "parts" not in made.choices[0].message.model_dump()
    assert drawer.drawn[-1][1].max_new_tokens == TOKENS + 64


USER = {"role": "user", "content": "red"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [USER, USER]}, "send one message, of the user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "send one message, of the user"),
        ({"messages": [USER], "stream": True}, "stream: answers of this model may hold images; leave it out"),
        ({"messages": [USER], "stop": "x"}, "stop: answers of this model may hold images"),
        ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format: answers of this model"),
        ({"messages": [{"role": "user", "content": [part("data:image/png;base64,AAAA")]}]}, "image"),
        ({"messages": [{"role": "user", "content": [part("http://example.org/a.png")]}]}, "not enabled on this server"),
        ({"messages": [{"role": "user", "content": "too long"}]}, "more positions than the context holds"),
    ],
)
def test_bad_requests(drawing, body, message):
    answer = httpx.post(f"{drawing.url}/v1/chat/completions", json={"model": "drawer"} | body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]

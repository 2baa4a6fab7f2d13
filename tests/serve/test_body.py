"""What a body costs is known before it is read, and what is read is what JSON says."""

import json
import random

import pytest

from magma_jax.serve.errors import RequestError
from magma_jax.serve.network import body
from magma_jax.serve.requests.schema import MAX_FIELDS, ChatRequest, parse

URI = "data:image/png;base64," + "iVBORw0K/+" * 200
PIECES = [
    "",
    "a",
    '"',
    "\\",
    "\\\\",
    "/",
    "data:",
    ",",
    "\u00e9",
    URI,
    URI[:1000],
    f'"{URI}',
    f"\\{URI}",
    f"{URI} \u00e9",
]


def read(content: bytes, most=2**20):
    return body.read_json(bytearray(content), most)


def value(rng, depth=3):
    if depth and rng.random() < 0.4:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and rng.random() < 0.4:
        return {text(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return rng.choice([None, True, 0, -1.5, text(rng), text(rng)])


def text(rng):
    return "".join(rng.choices(PIECES, k=rng.randrange(4)))


@pytest.mark.parametrize("slashes", [False, True])
def test_any_value_is_read_as_json_reads_it(slashes):
    """Whatever looks like an image within it, and however it is written."""
    rng = random.Random(0)
    for _ in range(500):
        wanted = value(rng)
        content = json.dumps(wanted, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        if slashes:
            content = content.replace("/", "\\/")
        assert read(content.encode()) == wanted


def test_images_do_not_count_as_text():
    images = [URI * 20] * 10
    content = json.dumps({"a": images, "b": "c" * 500})
    assert read(content.encode(), most=2_000)["a"] == images
    with pytest.raises(RequestError, match="bytes beside its images, at most 500 are taken") as found:
        read(content.encode(), most=500)
    assert found.value.status == 413
    assert read(content.replace("/", "\\/").encode(), most=2_000)["a"] == images


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"0,", b'"":0,', b'"a,b",'])
def test_values_are_counted_before_they_are_read(piece, monkeypatch):
    monkeypatch.setattr(body.json, "loads", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(RequestError, match="commas, colons and brackets"):
        read(b"[" + piece * body.MAX_MARKS + b"0]")
    with pytest.raises(RequestError, match="backslashes"):
        read(b'"' + b"\\/" * (body.MAX_BACKSLASHES + 1) + b'"')


def test_where_json_is_broken_is_told_if_it_stands_there():
    with pytest.raises(RequestError, match=r"Expecting value: line 1 column 7 \(char 6\)"):
        read(b'{"a": }')
    with pytest.raises(RequestError, match=r"not JSON \(Expecting value\)"):
        read(b'{"a": "%s", "b": }' % URI.encode())


@pytest.mark.parametrize("inside", [False, True])
def test_fields_of_an_object_are_counted_before_they_are_checked(inside):
    def refused(count):
        fields = {str(i): 0 for i in range(count)}
        with pytest.raises(RequestError) as found:
            parse({"messages": [fields]} if inside else fields, ChatRequest)
        return str(found.value)

    assert "an object of 1001 fields, at most 1000 are taken" in refused(MAX_FIELDS + 1)
    assert "Field required" in refused(MAX_FIELDS)

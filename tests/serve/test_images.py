"""Drawing and editing through OpenAI's routes, with OpenAI's client."""

import base64
import io
import threading
import time

import numpy as np
import openai
import pytest
from PIL import Image

from magma_jax.serve.network.form import MAX_FIELD_BYTES, MAX_PARTS
from tests import tiny
from tests.serve.drawing import GREY, SIZE, TOKENS
from tests.serve.test_connections import wait_for

RED, BLUE = tiny.COLOURS["red"], tiny.COLOURS["blue"]


@pytest.fixture(scope="module")
def client(drawing):
    with openai.OpenAI(base_url=f"{drawing.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def file_of(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def masked(box, size=(64, 64)):
    """A mask that marks a box, as OpenAI has it: transparent there."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), box)
    return file_of(mask)


BLUE_SQUARE = file_of(Image.new("RGB", (64, 64), BLUE))


def test_images_are_drawn(client, drawer):
    made = client.images.generate(model="drawer", prompt="red", n=3, size=f"{SIZE}x{SIZE}", extra_body={"seed": -5})
    assert len(made.data) == 3
    assert made.size == f"{SIZE}x{SIZE}"
    assert all((pixels(image.b64_json) == RED).all() for image in made.data)
    assert made.usage.output_tokens == 3 * TOKENS
    assert made.usage.total_tokens == 3 * TOKENS + 1
    options = drawer.drawn[-1][1]
    assert (options.n, options.seed, options.mask) == (3, -5, None)


def test_options_reach_the_model_and_seeds_differ_by_themselves(client, drawer):
    more = {"steps": 7, "guidance": 3, "temperature": 0.5, "candidates": 2, "cd_k": 4, "contrasted": 1}
    client.images.generate(prompt="red", n=1, extra_body=more)
    client.images.generate(prompt="red")
    first, second = (options for _, options in drawer.drawn[-2:])
    assert (first.steps, first.guidance, first.temperature, first.candidates) == (7, 3.0, (0.5, 0.5), 2)
    assert (first.cd_k, first.contrasted) == (4, 1)
    assert first.seed != second.seed
    assert second.steps is None


@pytest.mark.parametrize(("kind", "near"), [("png", 0), ("webp", 0), ("jpeg", 3)])
def test_file_formats(client, kind, near):
    made = client.images.generate(prompt="blue", output_format=kind)
    assert made.output_format == kind
    image = Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json)))
    assert image.format == kind.upper()
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - BLUE).max() <= near


def test_a_stream_shows_the_canvas_filling_in(client):
    events = list(client.images.generate(prompt="red", n=2, stream=True, partial_images=3))
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 6,
        *["image_generation.completed"] * 2,
    ]
    assert [event.index for event in events] == [0, 1] * 4
    assert [event.partial_image_index for event in events[:6]] == [0, 0, 1, 1, 2, 2]
    shares = [(pixels(event.b64_json) == RED).all(-1).mean() for event in events]
    assert shares == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]
    assert (pixels(events[0].b64_json)[-1] == GREY).all()
    assert events[-1].usage.output_tokens == 2 * TOKENS


def test_an_edit_changes_what_the_mask_marks(client):
    mask = masked((0, 0, 64, 32))
    made = client.images.edit(image=BLUE_SQUARE, mask=mask, prompt="red", n=2, size="auto")
    for image in made.data:
        found = pixels(image.b64_json)
        assert (found[: SIZE // 2] == RED).all()
        assert (found[SIZE // 2 :] == BLUE).all()
    assert made.usage.input_tokens_details.image_tokens == TOKENS

    events = list(client.images.edit(image=BLUE_SQUARE, mask=mask, prompt="red", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_an_edit_without_a_mask(client, drawer):
    client.images.edit(image=[BLUE_SQUARE], prompt="red", extra_body={"guidance": "2.5", "seed": "7"})
    options = drawer.drawn[-1][1]
    assert (options.mask, options.guidance, options.seed) == (None, 2.5, 7)
    # The transparent part of an image is a mask, as it was for OpenAI's first model.
    client.images.edit(image=masked((0, 0, 16, 64)), prompt="red")
    mask = drawer.drawn[-1][1].mask
    assert mask.mean() == 0.25
    assert mask[:, :16].all()


def test_an_asynchronous_client(drawing):
    import asyncio

    async def draw():
        async with openai.AsyncOpenAI(base_url=f"{drawing.url}/v1", api_key="none", max_retries=0) as client:
            made = await asyncio.gather(*(client.images.generate(prompt=colour) for colour in ("red", "blue")))
            return [pixels(one.data[0].b64_json)[0, 0].tolist() for one in made]

    assert asyncio.run(draw()) == [list(RED), list(BLUE)]


REFUSED = {
    "nothing to draw": ({"prompt": "purple"}, 400, "'purple' is no colour"),
    "no prompt": ({}, 400, "prompt: Field required"),
    "too many": ({"prompt": "red", "n": 9}, 400, "n: Input should be less than or equal to 8"),
    "another size": ({"prompt": "red", "size": "1024x1024"}, 400, "this model's images are 32x32"),
    "another model": ({"prompt": "red", "model": "dall-e-3"}, 404, "the model here is 'drawer'"),
    "a URL": (
        {"prompt": "red", "response_format": "url"},
        400,
        "response_format: not supported: an image comes as",
    ),
    "a vector image": ({"prompt": "red", "output_format": "svg"}, 400, "output_format: "),
    "transparency": (
        {"prompt": "red", "background": "transparent"},
        400,
        "background: not supported: images are",
    ),
    "CD-K": ({"prompt": "red", "contrasted": 1}, 400, "contrasted 1: give cd_k, and a number up to"),
    "steps": ({"prompt": "red", "steps": 0}, 400, "steps: Input should be greater than or equal to 1"),
    "an unknown field": ({"prompt": "red", "colour": "x"}, 400, "colour: no field that this server knows"),
    "a long prompt": ({"prompt": "x" * 9_000}, 400, "prompt: String should have at most 8000"),
    "a lost device": ({"prompt": "break"}, 500, "drawing failed (RuntimeError: the device is lost)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_gets_one_line(drawing, name):
    body, status, says = REFUSED[name]
    response = drawing.post("/v1/images/generations", **body)
    error = response.json()["error"]
    assert (response.status_code, says in error["message"]) == (status, True), error
    assert "\n" not in error["message"]
    assert drawing.post("/v1/images/generations", prompt="red").status_code == 200


def edited(drawing, fields, files):
    return drawing.http.post("/v1/images/edits", data=fields, files=files)


EDITS = {
    "no image": ({"prompt": "red"}, [("x", b"1")], 400, "image: missing"),
    "no prompt": ({}, [("image", BLUE_SQUARE)], 400, "prompt: Field required"),
    "two images": ({"prompt": "red"}, [("image[]", BLUE_SQUARE), ("image[]", BLUE_SQUARE)], 400, "image: one is taken"),
    "no image file": ({"prompt": "red"}, [("image", b"<svg/>")], 400, "image: "),
    "a damaged image": ({"prompt": "red"}, [("image", BLUE_SQUARE[:60])], 400, "image: "),
    "a large file": ({"prompt": "red"}, [("image", bytes(100_001))], 400, "image: more than 100000 bytes"),
    "many pixels": (
        {"prompt": "red"},
        [("image", file_of(Image.new("L", (2000, 2000))))],
        400,
        "image: ",
    ),
    "a mask of another size": (
        {"prompt": "red"},
        [("image", BLUE_SQUARE), ("mask", masked((0, 0, 8, 8), (32, 64)))],
        400,
        "mask: 32x64 pixels, the image has 64x64",
    ),
    "a mask that keeps everything": (
        {"prompt": "red"},
        [("image", BLUE_SQUARE), ("mask", BLUE_SQUARE)],
        400,
        "mask: no pixel is transparent, so everything is kept",
    ),
    "a number that is none": ({"prompt": "red", "n": "many"}, [("image", BLUE_SQUARE)], 400, "n: a number"),
    "neither true nor false": (
        {"prompt": "red", "stream": "1"},
        [("image", BLUE_SQUARE)],
        400,
        "stream: true or false",
    ),
    "a field twice": ({"prompt": ["red", "blue"]}, [("image", BLUE_SQUARE)], 400, "prompt: comes 2 times"),
    "many fields": (
        {"prompt": "red", **{f"x{i}": "1" for i in range(MAX_PARTS)}},
        [("image", BLUE_SQUARE)],
        400,
        f"the form has more than {MAX_PARTS} fields",
    ),
    "a long field": ({"prompt": "x" * (MAX_FIELD_BYTES + 1)}, [("image", BLUE_SQUARE)], 413, "prompt: more than"),
    "a file where text belongs": (
        {},
        [("image", BLUE_SQUARE), ("prompt", b"red")],
        400,
        "prompt: no file belongs here",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_cannot_be_edited_gets_one_line(drawing, name):
    fields, files, status, says = EDITS[name]
    response = edited(drawing, fields, [(field, ("a.png", content)) for field, content in files])
    error = response.json()["error"]
    assert (response.status_code, says in error["message"]) == (status, True), error
    assert "\n" not in error["message"]


FORM = "multipart/form-data; boundary=a"
DAMAGED = {
    "JSON": (b"{}", "application/json", 415, "send the image as multipart/form-data"),
    "no boundary": (b"x", "multipart/form-data", 400, "no multipart form with a boundary"),
    "no form": (b"no form at all", FORM, 400, "the form is damaged"),
    "half": (b'--a\r\nContent-Disposition: form-data; name="image"\r\n\r\nx', FORM, 400, "cut short"),
    "no name": (b"--a\r\nContent-Disposition: form-data\r\n\r\nx\r\n--a--\r\n", FORM, 400, "without a name"),
    "many headers": (b"--a\r\n" + b"X: y\r\n" * 5000 + b"\r\nx\r\n--a--\r\n", FORM, 400, "damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_forms(drawing, name):
    body, kind, status, says = DAMAGED[name]
    response = drawing.http.post("/v1/images/edits", content=body, headers={"Content-Type": kind})
    assert (response.status_code, says in response.json()["error"]["message"]) == (status, True), response.text


def test_forms_of_other_sites_are_refused(drawing):
    headers = {"Origin": "https://other.example"}
    files, fields = {"image": ("a.png", BLUE_SQUARE)}, {"prompt": "red"}
    assert drawing.http.post("/v1/images/edits", files=files, data=fields, headers=headers).status_code == 403
    # Elsewhere a form is no request at all.
    assert drawing.http.post("/v1/images/generations", files=files, data=fields).status_code == 415


def test_other_routes_say_what_is_here(drawing):
    assert drawing.get("/v1/models").json()["data"][0]["id"] == "drawer"
    assert drawing.http.post("/v1/completions", json={"prompt": "red"}).status_code == 404
    assert drawing.get("/health").json() == {"status": "ok"}
    text = drawing.get("/metrics").text
    assert "magma_images_drawn_total" in text
    assert "magma_new_tokens_total" not in text


def test_requests_wait_in_a_bounded_queue_and_end_in_time(drawing, drawer):
    drawer.go.clear()
    statuses, lock = [], threading.Lock()

    def ask():
        response = drawing.post("/v1/images/generations", prompt="red")
        with lock:
            statuses.append(response.status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One is being drawn and four wait; all of these end at their timeout of two seconds.
    assert sorted(set(statuses)) == [429, 504]
    assert statuses.count(504) in (4, 5)
    assert time.monotonic() - started < 10
    drawer.go.set()
    assert drawing.post("/v1/images/generations", prompt="red").status_code == 200


def test_a_client_that_leaves_frees_its_place(drawing, drawer, client):
    drawer.drawn.clear()
    drawer.go.clear()
    with client.images.with_streaming_response.generate(prompt="red", stream=True, partial_images=3):
        wait_for(lambda: drawer.drawn)
    drawer.go.set()
    assert drawing.post("/v1/images/generations", prompt="blue").status_code == 200
    assert [prompt for prompt, _ in drawer.drawn] == ["red", "blue"]
    assert drawing.engine.stats()[:2] == (0, 0)

"""The page when something fails: what came stays, and what is wrong is said at once, in red."""

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.support.ui import Select

from tests.serve.browser import Page
from tests.serve.running import expected, square
from tests.serve.test_page import event

RED = "rgba(179, 21, 27, 1)"


@pytest.fixture
def page(browser, server, tmp_path):
    browser.get(server.url)
    return Page(browser, tmp_path)


def error(message):
    return {"error": {"message": message}}


def test_what_the_server_refuses_is_said(page):
    page.write("")
    page.ask()
    assert "prompt is empty" in page.text(".notice")
    assert page.text("#status") == "failed"
    assert page.colour("#status") == page.colour(".notice") == RED
    page.write("A picture of")
    page.ask()
    assert page.text(".notice") == ""
    assert page.colour("#status") != RED


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (0, "", "the server cannot be reached"),
        (401, error("wrong or missing API key"), "wrong or missing API key; open this page with the key"),
        (413, "<html>too large</html>", "the server answers 413 Something; take smaller or fewer images"),
        (429, error("too many requests are waiting"), "too many requests are waiting; try again in a moment"),
        (503, error("the engine has stopped"), "the engine has stopped; try again in a moment"),
        (504, error("not done within 120 s"), "not done within 120 s"),
        (502, "", "the server answers 502"),
        (200, "data: {oh", "the connection broke off before the answer was complete"),
        (200, "data: {oh\n\n", "what the server sent cannot be read"),
    ],
)
def test_failures_of_an_answer_and_of_attention(page, model, status, body, says):
    page.upload("red")
    page.stub("attention", status, body)
    page.ask()
    page.wait(lambda: page.one("#again").is_displayed())
    said = expected(model, square("red").resize((128, 96)), "A picture of", steps=32)
    assert page.text(".answer") == said
    assert says in page.text("#about") or status == 200
    assert page.colour("#about") == RED
    assert " tokens in " in page.text("#status")

    page.stub("chat/completions", status, body)
    page.ask()
    assert says in page.text(".notice")
    assert page.text("#status") == "failed"


def test_attention_that_failed_can_be_had_again(page):
    page.upload("red")
    page.stub("attention", 0, once=True)
    page.ask()
    page.wait(lambda: page.one("#again").is_displayed())
    page.one("#again").click()
    page.wait(lambda: page.all(".word"))
    said = page.text(".answer")

    # Another layer fails: no word shows what belongs to the layer before.
    page.stub("attention", 500, error("no memory"), once=True)
    Select(page.one("#layer")).select_by_value("1")
    page.wait(lambda: page.one("#again").is_displayed())
    assert page.text("#about") == "No attention: no memory"
    assert (page.text(".answer"), page.all(".word")) == (said, [])
    page.one("#again").click()
    page.wait(lambda: page.all(".word"))
    assert page.text(".answer") == said
    assert not page.one("#again").is_displayed()


def test_only_the_newest_choice_of_a_layer_is_shown(page):
    page.upload("red")
    page.ask()
    page.wait(lambda: page.all(".word"))
    page.stub("attention", 200, "", later=True, once=True)
    Select(page.one("#layer")).select_by_value("0")
    page.run("window.late = [send, end]")
    Select(page.one("#layer")).select_by_value("1")
    page.wait(lambda: page.text("#about").startswith("Note:"))
    late = {"words": [], "grid": None, "note": "late", "layers": 2, "heads": 2}
    page.browser.execute_async_script(
        """const [text, done] = arguments;
        try { late[0](text); late[1](); } catch { /* nobody reads it any more */ }
        setTimeout(done, 50);""",
        json.dumps(late),
    )
    assert page.all(".word")
    assert page.one("#layer").get_attribute("value") == "1"


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ("end()", "broke off"),
        ("breakOff()", "broke off"),
        (f"send('data: {json.dumps(error('not done within 20 s'))}\\n\\n')", "not done within 20 s"),
    ],
)
def test_part_of_an_answer_stays(page, then, says):
    page.stub("chat/completions", 200, event("half an answer"), later=True)
    page.one("#ask").click()
    page.wait(lambda: page.text(".answer"))
    page.run(then)
    page.wait(lambda: page.text("#status") == "failed")
    assert page.text(".answer") == "half an answer"
    assert says in page.text(".notice")


def test_an_empty_answer_is_called_empty(page):
    page.stub("chat/completions", 200, event("", "stop"))
    page.ask()
    assert "an empty answer" in page.text("#status")


def test_requests_that_are_too_large_for_the_server(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    page.choose(tmp_path / "noise.png")
    page.wait(lambda: page.all(".frame"))
    page.ask()
    assert "the request has more than 1000000 bytes" in page.text(".notice")
    page.run("LIMITS.body = 1000")
    page.ask()
    assert "take smaller or fewer ones" in page.text(".notice")


def png_header(width, height):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff():
    buffer = io.BytesIO()
    square("red").save(buffer, "TIFF")
    return buffer.getvalue()


KINDS = "it is no image of a kind that is taken (PNG, JPEG, WEBP, GIF, BMP)"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", f"{KINDS}, but image/svg+xml"),
        ("photo.tif", tiff(), f"{KINDS}, but image/tiff"),
        ("paper.pdf", b"%PDF-1.7", f"{KINDS}, but application/pdf"),
        ("phone.jpg", b"\0\0\0\x18ftypheic", f"{KINDS}, by its content"),
        ("none.png", b"", "it is empty"),
        ("broken.png", b"\x89PNG\r\n\x1a\nnothing", "it is damaged"),
        ("heavy.bmp", b"BM" + bytes(10 * 2**20), "it has 10.0 MB, an image may have 10 MB"),
        ("wide.png", png_header(8000, 6000), "it has 48 megapixels, an image may have 40"),
    ],
)
def test_files_of_refused_kinds_say_so_at_once(page, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    square("blue").save(tmp_path / "fine.jpg")
    page.choose(tmp_path / name, tmp_path / "fine.jpg")
    page.wait(lambda: page.text(".notice"))
    assert page.text(".notice") == f"{name} is refused: {says}" or says == "it is damaged"
    assert says in page.text(".notice")
    assert page.colour(".notice") == RED
    assert [canvas.get_attribute("aria-label") for canvas in page.all("canvas")] == ["fine.jpg"]
    page.upload("red")
    assert page.text(".notice") == ""


DROP = """
const [selector, kind, data] = arguments, carried = new DataTransfer(), target = document.querySelector(selector);
if (kind === "file") carried.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], "dropped"));
else carried.setData(kind, data);
const options = { dataTransfer: carried, clipboardData: carried, bubbles: true, cancelable: true };
return ["dragover", "drop"].map((name) => !target.dispatchEvent(new DragEvent(name, options)));
"""


@pytest.mark.parametrize("target", [".turn textarea", "#sampling"])
def test_dropped_links_are_refused_at_once_and_files_taken_anywhere(page, target):
    assert page.run(DROP, target, "text/uri-list", "https://example.org/cat.jpg") == [True, True]
    assert page.text(".notice").startswith("Links are refused: this page fetches nothing.")
    assert page.colour(".notice") == RED
    # Text goes where the browser puts it.
    assert page.run(DROP, target, "text/plain", "words") == [False, False]
    with io.BytesIO() as file:
        square("red").save(file, "PNG")
        assert page.run(DROP, target, "file", base64.b64encode(file.getvalue()).decode()) == [True, True]
    page.wait(lambda: page.all(".frame"))
    assert page.text(".notice") == ""


def test_links_among_text_are_said_to_be_text(page):
    for link in ("https://example.org/cat.jpg", "What is on http://example.org/a ?", "file:///etc/cat.png"):
        page.write(link)
        assert "the model reads the address as text" in page.text(".notice")
        page.write("What is on it?")
        assert page.text(".notice") == ""
    paste = """const carried = new DataTransfer();
    carried.setData("text/plain", arguments[0]);
    document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: carried, bubbles: true }));"""
    page.run(paste, "https://example.org/cat.jpg")
    assert page.text(".notice").startswith("Links are refused")


def test_the_page_waits_for_a_server_that_starts(browser, server, tmp_path):
    script = """const real = window.fetch; let asked = 0;
    window.fetch = (url, options) => asked++ ? real(url, options)
      : Promise.resolve(new Response('{"error": {"message": "starting"}}', { status: 503 }));
    window.said = [];
    new MutationObserver(() => {
      const says = document.getElementById("status")?.textContent;
      if (says && says !== said.at(-1)) said.push(says);
    }).observe(document, { childList: true, subtree: true });"""
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        browser.get(server.url)
        page = Page(browser, tmp_path)
        assert page.run("return said")[-2:] == ["starting", "ready"]
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)

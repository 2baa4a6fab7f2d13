"""The page in a real browser: what a person does with it, by mouse and by keyboard."""

import json

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import Select

from magma_jax.data.images import FORMATS
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.prompts.images import ImageRules
from tests.serve.browser import Page
from tests.serve.running import expected, square


@pytest.fixture
def page(browser, server, tmp_path):
    browser.get_log("browser")  # what other tests have left there
    browser.get(server.url)
    return Page(browser, tmp_path)


def test_upload_ask_and_look_where_the_words_looked(page, model):
    page.run(
        """window.seen = [];
        new MutationObserver(() => seen.push(document.querySelector(".answer").textContent))
            .observe(document.querySelector(".answer"), { childList: true, characterData: true, subtree: true });
        document.getElementById("max_tokens").value = 20;"""
    )
    page.upload("red")
    page.ask()
    said = expected(model, square("red").resize((128, 96)), "A picture of", steps=20)
    page.wait(lambda: page.all(".word"))
    assert page.text(".answer") == said
    # It came in pieces, each longer than the one before.
    lengths = [len(text) for text in page.run("return seen") if text and said.startswith(text)]
    assert len(set(lengths)) > 2
    assert lengths == sorted(lengths)

    first = page.all(".word")[0]
    assert not page.all(".map")
    webdriver.ActionChains(page.browser).move_to_element(first).perform()
    assert len(page.all(".map > div")) == 4
    frame, sampled = page.one(".frame canvas").rect, page.one(".map").rect
    assert sampled["width"] == sampled["height"] == frame["height"]
    assert sampled["x"] == frame["x"] + (frame["width"] - frame["height"]) / 2
    assert "of its attention is on images" in page.text("#about")
    webdriver.ActionChains(page.browser).move_to_element(page.one("h1")).perform()
    assert not page.all(".map")

    # The same by keyboard, and for one head.
    first.send_keys(Keys.ARROW_RIGHT)
    assert page.browser.switch_to.active_element == page.all(".word")[1]
    rollout = [cell.get_attribute("style") for cell in page.all(".map > div")]
    for name in ("#layer", "#head"):
        word = page.all(".word")[0]
        Select(page.one(name)).select_by_value("1")
        page.wait(lambda word=word: staleness_of(word)(page.browser))
    page.all(".word")[1].send_keys(Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert [cell.get_attribute("style") for cell in page.all(".map > div")] != rollout
    assert not page.browser.get_log("browser")


def test_turns_are_examples_and_their_answers_can_be_written(page, model):
    page.upload("green")
    page.write("Q: What colour is it? A:")
    page.one(".write").click()
    page.write("green", ".edit")
    page.one("#more").click()
    page.upload("blue")
    page.write("Q: What colour is it? A:")
    page.run("document.getElementById('max_tokens').value = 8")
    page.one(".part textarea").send_keys(Keys.CONTROL, Keys.ENTER)
    images = [square(name).resize((128, 96)) for name in ("green", "blue")]
    question = "Q: What colour is it? A:"
    page.wait(lambda: " tokens in " in page.text("#status"))
    prompt = (images[0], question + " green\n", images[1], question)
    page.wait(lambda: page.all(".word"))
    assert page.text(".turn:last-child .answer").startswith(expected(model, *prompt, steps=8))
    page.all(".word")[0].send_keys(Keys.ARROW_RIGHT)
    assert len(page.all(".map")) == 2


def names(page):
    return [turn.get_attribute("aria-label") for turn in page.all(".turn")]


def texts(page):
    return [text.get_attribute("value") for text in page.all(".part textarea")]


def test_turns_and_parts_can_be_removed_and_come_back(page):
    page.write("one")
    assert not page.one(".gone").is_displayed()
    for text in ("two", "three"):
        page.one("#more").click()
        page.write(text)
    assert names(page) == ["Turn 1", "Turn 2", "Turn 3"]
    page.all(".gone")[1].click()
    assert (names(page), texts(page)) == (["Turn 1", "Turn 2"], ["one", "three"])
    assert page.text("#status") == "Turn 2 removed"
    assert page.browser.switch_to.active_element == page.all(".part textarea")[1]
    page.one("#undo").click()
    assert (names(page), texts(page)) == (["Turn 1", "Turn 2", "Turn 3"], ["one", "two", "three"])
    assert not page.one("#undo").is_displayed()

    page.one("#fresh").click()
    assert texts(page) == ["A picture of"]
    page.one("#undo").click()
    assert texts(page) == ["one", "two", "three"]
    page.one(".remove").click()
    assert texts(page) == ["one", "two"]
    page.one("#undo").click()
    assert texts(page) == ["one", "two", "three"]

    # What is removed is not asked, and what is changed cannot be undone by surprise.
    page.all(".gone")[0].click()
    page.write("2", ".turn:first-child .part textarea")
    assert not page.one("#undo").is_displayed()
    assert [message["role"] for message in page.run("return messages()")] == ["user", "assistant", "user"]


def event(content="", finish=None):
    """A piece of an answer, of one token."""
    choice = {"delta": {"content": content}, "finish_reason": finish, "token_ids": [1]}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def test_changes_while_an_answer_comes(page):
    page.upload("red")
    for act, turns in (("more", 2), ("fresh", 1)):
        page.stub("chat/completions", 200, event("so far"), later=True, once=True)
        page.one("#ask").click()
        page.wait(lambda: page.all(".answer")[-1].text == "so far")
        page.one(f"#{act}").click()
        assert len(page.all(".turn")) == turns
        if act == "more":
            page.run("send(arguments[0]); end()", event(" and on", "stop"))
            page.wait(lambda: " tokens in " in page.text("#status"))
            assert page.text(".turn:first-child .answer") == "so far and on"
            # The maps would be laid over images that may be others.
            assert not page.one("#seen").is_displayed()
    page.wait(lambda: not page.one("#stop").is_displayed())
    assert page.text("#status") == "ready"


def test_stopped_answers_stay(page):
    page.stub("chat/completions", 200, event("half"), later=True)
    page.one("#ask").click()
    page.wait(lambda: page.text(".answer") == "half")
    page.one("#stop").click()
    page.wait(lambda: page.text("#status") == "stopped")
    assert page.text(".answer") == "half"
    assert page.browser.switch_to.active_element == page.one("#ask")


def test_the_first_frame_of_an_animation_is_shown(page, tmp_path):
    frames = [square(name) for name in ("red", "blue")]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=20)
    page.choose(path)
    page.wait(lambda: page.all(".frame"))
    pixel = "return [...document.querySelector('canvas').getContext('2d').getImageData(9, 9, 1, 1).data]"
    with Image.open(path) as moving:
        assert tuple(page.run(pixel)[:3]) == moving.convert("RGB").getpixel((9, 9))


def test_sampling_fields(page):
    named = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "max_tokens": 32}
    assert page.run("return options()") == named
    for name, value in (("temperature", "0.75"), ("seed", "7"), ("max_tokens", ""), ("stop_text", ".")):
        page.run("document.getElementById(arguments[0]).value = arguments[1]", name, value)
    wanted = page.run("return options()")
    assert (wanted["temperature"], wanted["seed"], wanted["stop"], "max_tokens" in wanted) == (0.75, 7, ".", False)
    page.run("document.getElementById('top_p').value = '2'")
    page.one("#ask").click()
    assert page.text("#status").startswith("top p: ")
    assert page.one("#top_p").is_displayed()
    assert page.text(".answer") == ""


def test_the_page_knows_what_the_server_takes(page):
    kinds, limits = page.run("return [Object.keys(KINDS), LIMITS]")
    assert sorted(kinds) == sorted(FORMATS)
    rules, config = ImageRules(), ServerConfig()
    assert limits == {"pixels": rules.max_pixels, "bytes": rules.max_bytes, "body": config.max_body_bytes}

"""The page in a real browser: what a person does with it, by mouse and by keyboard."""

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import Select

from tests.serve.browser import Page
from tests.serve.running import expected, square


@pytest.fixture
def page(browser, server, tmp_path):
    browser.get(server.url)
    return Page(browser, tmp_path)


def test_upload_ask_and_look_where_the_words_looked(page, model):
    page.browser.execute_script(
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
    lengths = [len(text) for text in page.browser.execute_script("return seen") if text and said.startswith(text)]
    assert len(set(lengths)) > 2
    assert lengths == sorted(lengths)

    first = page.all(".word")[0]
    assert not page.all(".map")
    webdriver.ActionChains(page.browser).move_to_element(first).perform()
    assert len(page.all(".map > div")) == 4
    frame, drawn = page.one(".frame img").rect, page.one(".map").rect
    assert drawn["width"] == drawn["height"] == frame["height"]
    assert drawn["x"] == frame["x"] + (frame["width"] - frame["height"]) / 2
    assert "of its attention is on pictures" in page.text("#about")
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
    page.one(".turn .plain:last-of-type").click()
    page.write("green", ".edit")
    page.one("#more").click()
    page.upload("blue")
    page.write("Q: What colour is it? A:")
    page.browser.execute_script("document.getElementById('max_tokens').value = 8")
    page.one(".part textarea").send_keys(Keys.CONTROL, Keys.ENTER)
    pictures = [square(name).resize((128, 96)) for name in ("green", "blue")]
    question = "Q: What colour is it? A:"
    page.wait(lambda: " tokens in " in page.text("#status"))
    prompt = (pictures[0], question + " green\n", pictures[1], question)
    page.wait(lambda: page.all(".word"))
    assert page.text(".turn:last-child .answer").startswith(expected(model, *prompt, steps=8))
    page.all(".word")[0].send_keys(Keys.ARROW_RIGHT)
    assert len(page.all(".map")) == 2


def test_what_the_server_refuses_is_said(page):
    page.write("")
    page.ask()
    assert "prompt is empty" in page.text(".answer.error")

"""The page for everybody: barriers that axe-core finds, by keyboard alone, on a touch screen, behind a key."""

from urllib.parse import quote

import pytest
from selenium import webdriver
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.keys import Keys

from magma_jax.serve.config import ServerConfig
from tests.serve.browser import Page, axe, device, findings
from tests.serve.running import RULES, Running

# Characters that an address, a header or a form would spoil.
KEY = "s\u00e9cret +/%41&#?"


@pytest.fixture
def page(browser, server, tmp_path):
    browser.get(server.url)
    return Page(browser, tmp_path)


def tap(page, element):
    finger = ActionBuilder(page.browser, mouse=PointerInput("touch", "finger"))
    finger.pointer_action.move_to(element).pointer_down().pointer_up()
    finger.perform()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "touch"), [(900, False), (360, True)])
def test_axe_finds_no_barriers(page, scheme, width, touch, tmp_path):
    program = axe()
    if not program:
        pytest.skip("no axe-core: pip install axe-core-python, or npm install --no-save axe-core")
    page.browser.set_script_timeout(60)
    with device(page.browser, scheme, width, 740, touch):
        page.run(program)
        assert findings(page) == []

        page.upload("red")
        page.upload("green")
        page.run("document.getElementById('sampling').open = true")
        page.ask()
        page.wait(lambda: page.all(".word"))
        page.all(".word")[0].send_keys(Keys.ARROW_RIGHT)
        assert page.one(".word.shown")
        assert findings(page) == []

        # Errors of every place, turns, an answer written by hand, a part that may come back, and while an answer comes.
        page.stub("attention", 0)
        page.one("#relative").click()
        page.wait(lambda: page.one("#again").is_displayed())
        assert findings(page) == []
        (tmp_path / "note.txt").write_text("no image")
        page.run("document.getElementById('more').click(); document.querySelector('.write').click()")
        page.stub("chat/completions", 500)
        page.run("ask()")
        page.wait(lambda: page.text("#status") == "failed")
        page.stub("chat/completions", 200, later=True)
        page.run("ask()")
        page.run("document.querySelector('.remove').click()")
        page.choose(tmp_path / "note.txt")
        page.wait(lambda: "note.txt" in page.text(".notice"))
        assert page.one("#stop").is_displayed()
        assert page.one("#undo").is_displayed()
        assert findings(page) == []
        page.one("#stop").click()


def test_by_keyboard_alone(page):
    page.upload("red")

    def tab(*keys):
        webdriver.ActionChains(page.browser).send_keys(*keys).perform()
        return page.browser.switch_to.active_element

    page.run("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex');")
    reached = []
    while len(reached) < 40:
        element = tab(Keys.TAB)
        if element.tag_name == "body":
            break
        reached.append(element)
        # What has the focus is seen, not hidden behind the bar.
        assert element.value_of_css_property("outline-style") != "none"
    controls = [element for element in page.all("button, textarea, input, select, summary") if element.is_displayed()]
    assert reached == controls

    page.run("document.querySelector('.part textarea').focus()")
    while tab(Keys.TAB) != page.one("#ask"):
        pass
    tab(Keys.ENTER)
    page.wait(lambda: page.all(".word"))
    # The focus is where it was, and what was answered is read out.
    assert page.browser.switch_to.active_element == page.one("#ask")
    assert page.text("#heard") == f"Answer: {page.text('.answer').strip()}"
    words = page.all(".word")
    webdriver.ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert page.browser.switch_to.active_element == words[0]
    assert page.all(".map")
    assert tab(Keys.END) == words[-1]
    assert tab(Keys.HOME) == words[0]
    tab(Keys.ESCAPE)
    assert not page.all(".map")
    # All words are one stop of the Tab key.
    assert tab(Keys.TAB) == page.one("#ask")


def test_a_touch_screen_gets_words_of_touch(page):
    def shown():
        return page.one("body").text

    page.upload("red")
    page.ask()
    page.wait(lambda: page.all(".word"))
    assert "Point at a word" in shown()
    assert "Ctrl Enter asks" in shown()
    assert "Tap" not in shown()
    with device(page.browser, width=360, height=740, touch=True):
        for word in ("Ctrl", "Esc", "Point", "hover", "drop", "←"):
            assert word not in shown()
        assert "Tap a word" in shown()
        assert page.run("return document.documentElement.scrollWidth") == 360
        for button in page.all("button:not(.word), select"):
            assert not button.is_displayed() or min(button.size.values()) >= 44
        words = page.all(".word")
        for word in (words[0], words[-1]):
            tap(page, word)
            assert page.one(".word.shown") == word
            assert len(page.all(".map")) == 1
        # A long answer keeps the button that stops it in sight.
        page.stub("chat/completions", 200, "", later=True)
        tap(page, page.one("#ask"))
        page.wait(lambda: page.one("#stop").is_displayed())
        page.run("document.querySelector('.answer').textContent = 'word '.repeat(2000); scrollTo(0, 500)")
        inside = (
            "const { bottom } = document.getElementById('stop').getBoundingClientRect(); return bottom < innerHeight"
        )
        assert page.run(inside)
        tap(page, page.one("#stop"))


@pytest.fixture(scope="module")
def locked(model):
    running = Running(model, ServerConfig("tiny", KEY, images=RULES))
    yield running
    running.stop()


def test_a_key_in_the_address_is_used_and_goes_from_sight(browser, locked, tmp_path):
    # As the password of the address.
    browser.get(locked.url.replace("//", f"//anybody:{quote(KEY, safe='')}@"))
    page = Page(browser, tmp_path)
    assert browser.current_url == f"{locked.url}/"
    page.ask()
    assert " tokens in " in page.text("#status")

    # Behind it, where it never leaves the browser. The one that is known must not stand in for a wrong one.
    browser.get("about:blank")
    browser.get(f"{locked.url}/#key=wrong")
    page.wait(lambda: "wrong or missing API key" in page.text("#status"))
    assert page.colour("#status") == "rgba(179, 21, 27, 1)"
    assert browser.current_url == f"{locked.url}/"
    page.run("location.hash = arguments[0]", f"#key={quote(KEY, safe='')}")
    page.wait(lambda: page.text("#status") == "ready")
    assert browser.current_url == f"{locked.url}/"
    page.ask()
    assert " tokens in " in page.text("#status")
    # A percent sign that is none of an address is part of the key.
    page.run("location.hash = '#key=100%'")
    page.wait(lambda: "wrong or missing API key" in page.text("#status"))
    assert page.run("return key") == "100%"

"""The page that draws, in a real browser."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from tests import tiny
from tests.serve.browser import Page, axe, device, findings
from tests.serve.drawing import SIZE

RED, BLUE = tiny.COLOURS["red"], tiny.COLOURS["blue"]


@pytest.fixture
def page(browser, drawing, drawer, tmp_path):
    browser.get(drawing.url)
    yield Page(browser, tmp_path)
    drawer.go.set()


def draw(page, text):
    page.write(text, "#prompt")
    page.one("#draw").click()


def finish(page):
    page.wait(lambda: " in " in page.text("#status") or "failed" in page.text("#status"))


def shown(page):
    """Pixels of the drawn images."""
    sources = [image.get_attribute("src").split(",")[1] for image in page.all("figure img")]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB")) for source in sources]


def add_image(page, size=(64, 64)):
    path = page.folder / "blue.png"
    Image.new("RGB", size, BLUE).save(path)
    page.choose(path)
    page.wait(lambda: page.one("#editor").is_displayed())


def test_four_images_fill_in(page, drawer):
    page.run(
        """window.seen = 0;
        new MutationObserver(() => { seen += 1; })
            .observe(document.getElementById("drawn"), { childList: true, subtree: true });"""
    )
    draw(page, "red")
    finish(page)
    assert page.text("#status").startswith("4 images in")
    assert all((pixels == RED).all() for pixels in shown(page))
    assert page.run("return seen") > 4
    assert drawer.drawn[-1][1].n == 4
    assert [link.get_attribute("download") for link in page.all("figure a")] == ["drawing.png"] * 4


def test_a_mask_by_pointer(page, drawer):
    add_image(page)
    page.run("document.getElementById('brush').value = 50")
    mask = page.one("#mask")
    side = mask.rect["width"]
    moves = webdriver.ActionChains(page.browser, duration=0)
    moves.move_to_element_with_offset(mask, round(-side / 2) + 2, round(-side / 4)).click_and_hold()
    moves.move_to_element_with_offset(mask, round(side / 2) - 2, round(-side / 4)).release().perform()
    draw(page, "red")
    finish(page)
    wanted = drawer.drawn[-1][1].mask
    assert wanted.shape == (64, 64)
    assert wanted[:28].all()
    assert not wanted[36:].any()
    for pixels in shown(page):
        assert (pixels[: SIZE // 2 - 2] == RED).all()
        assert (pixels[SIZE // 2 + 2 :] == BLUE).all()

    # The same places inverted, and none.
    page.one("#invert").click()
    page.one("#draw").click()
    finish(page)
    assert (drawer.drawn[-1][1].mask == ~wanted).all()
    page.one("#clear").click()
    page.one("#draw").click()
    page.wait(lambda: drawer.drawn[-1][1].mask is None)
    finish(page)


def test_a_mask_by_keyboard(page, drawer):
    add_image(page, (64, 32))
    page.run("document.getElementById('brush').value = 25")
    page.run("document.getElementById('mask').focus()")
    assert page.one("#cursor").is_displayed()
    keys = [Keys.ARROW_LEFT] * 6 + [" "] + [Keys.ARROW_UP] * 6 + [" "]
    webdriver.ActionChains(page.browser).send_keys(*keys).perform()
    draw(page, "red")
    finish(page)
    mask = drawer.drawn[-1][1].mask
    assert mask.shape == (32, 64)
    assert mask[:8, :8].all()
    assert not mask[:, 16:].any()


def test_a_drawn_image_is_edited(page, drawer):
    draw(page, "red")
    finish(page)
    page.all("figure button")[0].click()
    page.wait(lambda: page.one("#editor").is_displayed())
    assert page.text("#draw") == "Draw anew"
    draw(page, "blue")
    finish(page)
    assert drawer.drawn[-1][0] == "blue"
    page.one("#close").click()
    assert page.text("#draw") == "Draw"


def test_errors_and_stops_are_said(page, drawer):
    draw(page, "purple")
    finish(page)
    assert page.text("#status") == "failed"
    assert "no colour" in page.text("#notice")
    assert not page.all("figure")
    (page.folder / "note.png").write_text("no image")
    page.choose(page.folder / "note.png")
    page.wait(lambda: "note.png is refused" in page.text("#notice"))

    drawer.go.clear()
    draw(page, "red")
    page.wait(lambda: page.one("#stop").is_displayed())
    webdriver.ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    page.wait(lambda: page.text("#status") == "stopped")
    assert not page.all("figure")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "touch"), [(900, False), (360, True)])
def test_axe_finds_no_barriers(page, scheme, width, touch):
    program = axe()
    if not program:
        pytest.skip("no axe-core: pip install axe-core-python, or npm install --no-save axe-core")
    page.browser.set_script_timeout(60)
    with device(page.browser, scheme, width, 740, touch):
        page.run(program)
        assert findings(page) == []
        add_image(page)
        page.run("document.getElementById('options').open = true")
        page.run("document.getElementById('mask').focus()")
        page.run("document.getElementById('prompt').value = 'red'; draw()")
        finish(page)
        assert len(page.all("figure img")) == 4
        assert findings(page) == []
        page.run("document.getElementById('prompt').value = 'purple'; draw()")
        finish(page)
        assert findings(page) == []

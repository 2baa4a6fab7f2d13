"""A browser without a window, and what a person sees and does on the page."""

import contextlib
import shutil
from collections.abc import Iterator

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.running import square

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
# Why there is none; empty if there is one.
MISSING = "" if CHROMIUM and DRIVER else "no chromium with its driver (Debian: chromium, chromium-driver)"


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Debian's browser."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Nothing but the server of the test can be reached: the page works without a network.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=900,1200",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a person sees and does."""

    def __init__(self, browser, folder):
        self.browser, self.folder = browser, folder
        self.wait(lambda: self.text("#status") == "ready")

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.all(selector)[-1]

    def text(self, selector):
        return self.one(selector).get_attribute("textContent")

    def wait(self, condition):
        WebDriverWait(self.browser, 30, poll_frequency=0.02).until(lambda _: condition())

    def upload(self, colour):
        path = self.folder / f"{colour}.png"
        square(colour).resize((128, 96)).save(path)
        count = len(self.all(".frame"))
        self.one("input[type=file]").send_keys(str(path))
        self.wait(lambda: len(self.all(".frame")) == count + 1)

    def write(self, text, selector=".part textarea"):
        self.one(selector).send_keys(Keys.CONTROL, "a", Keys.NULL, text or Keys.DELETE)

    def ask(self):
        self.one("#ask").click()
        self.wait(lambda: " tokens in " in self.text("#status") or "failed" in self.text("#status"))

"""A browser without a window, and what a person sees and does on the page."""

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

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


def axe() -> str:
    """The program of axe-core, which looks for barriers: npm's newer one if it is installed, else a wheel's; or ""."""
    wheel = importlib.util.find_spec("axe_core_python")
    places = [
        Path(__file__).parents[2] / "node_modules" / "axe-core",
        *(wheel.submodule_search_locations if wheel else ()),
    ]
    files = [Path(place) / "axe.min.js" for place in places]
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")


# Answers one route in the server's place: once, or as long as the page is there.
_STUB = """
const [route, status, body, later, once] = arguments, real = window.fetch;
window.fetch = (url, options) => {
  if (!url.endsWith(route)) return real(url, options);
  if (once) window.fetch = real;
  if (!status) return Promise.reject(new TypeError("Failed to fetch"));
  const stream = new ReadableStream({ start(controller) {
    controller.enqueue(new TextEncoder().encode(body));
    window.send = (text) => controller.enqueue(new TextEncoder().encode(text));
    window.end = () => controller.close();
    window.breakOff = () => controller.error(new TypeError("network error"));
    if (!later) controller.close();
    options.signal?.addEventListener("abort", () => controller.error(options.signal.reason));
  } });
  return Promise.resolve(new Response(stream, { status, statusText: "Something" }));
};
"""


class Page:
    """What a person sees and does."""

    def __init__(self, browser, folder):
        self.browser, self.folder = browser, folder
        self.wait(lambda: self.text("#status") == "ready")

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def stub(self, route, status, body="", *, later=False, once=False):
        """Answers a route in the server's place; 0 for no connection.

        The rest of the body may come ``later``, by ``send(text)`` in the page, and ``end()`` or ``breakOff()``.
        """
        self.run(_STUB, route, status, body if isinstance(body, str) else json.dumps(body), later, once)

    def colour(self, selector):
        return self.one(selector).value_of_css_property("color")

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.all(selector)[-1]

    def text(self, selector):
        return self.one(selector).get_attribute("textContent")

    def wait(self, condition):
        WebDriverWait(self.browser, 30, poll_frequency=0.02).until(lambda _: condition())

    def choose(self, *paths):
        """Files, in the dialog of the last turn."""
        self.one("input[type=file]").send_keys("\n".join(str(path) for path in paths))

    def upload(self, colour):
        path = self.folder / f"{colour}.png"
        square(colour).resize((128, 96)).save(path)
        count = len(self.all(".frame"))
        self.choose(path)
        self.wait(lambda: len(self.all(".frame")) == count + 1)

    def write(self, text, selector=".part textarea"):
        self.one(selector).send_keys(Keys.CONTROL, "a", Keys.NULL, text or Keys.DELETE)

    def ask(self):
        self.one("#ask").click()
        self.wait(lambda: " in " in self.text("#status") or "failed" in self.text("#status"))


@contextlib.contextmanager
def device(browser, scheme="light", width=900, height=1200, touch=False):
    """As if the browser ran on such a device."""

    def set(features, touch):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})

    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    set([{"name": "prefers-color-scheme", "value": scheme}], touch)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        set([], False)


def findings(page):
    """What axe-core finds to be critical or serious, with the elements."""
    asked = "const done = arguments[0]; axe.run(document).then(done, (error) => done({ error: String(error) }));"
    found = page.browser.execute_async_script(asked)
    assert found["passes"], found
    bad = [entry for entry in found["violations"] if entry["impact"] in ("critical", "serious")]
    return [(entry["id"], [node["html"][:200] for node in entry["nodes"]]) for entry in bad]

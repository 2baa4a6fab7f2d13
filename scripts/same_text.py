"""Compares the greedy answers of a checkpoint through command line, Python, server and web page.

    python scripts/same_text.py --checkpoint runs/quickstart image.png other.png

The page needs chromium, chromedriver and selenium. Prints JSON; ends with 1 if an answer differs.
"""

import argparse
import base64
import json
import mimetypes
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from magma_jax import ImageInput, Magma


def by_command_line(checkpoint: str, images: list[str], prompt: str) -> list[str]:
    """One run of the command per image."""
    command = [sys.executable, "-m", "magma_jax.generate", "--checkpoint", checkpoint]
    return [
        subprocess.run([*command, image, prompt], check=True, capture_output=True, text=True).stdout for image in images
    ]


def by_python(checkpoint: str, images: list[str], prompt: str) -> list[str]:
    """One batch."""
    model = Magma.from_checkpoint(checkpoint)
    batch = model.preprocess_batch([[ImageInput(image), prompt] for image in images])
    return model.generate(batch, max_steps=32, temperature=0.0)


def by_server(url: str, images: list[str], prompt: str) -> list[str]:
    """Chat completions."""
    answers = []
    for image in images:
        kind = mimetypes.guess_type(image)[0]
        data = f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": prompt}]
        body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 32}).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            answers.append(json.load(response)["choices"][0]["message"]["content"])
    return answers


def by_page(url: str, images: list[str], prompt: str) -> list[str]:
    """Through the page, in a headless browser."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    answers = []
    try:
        for image in images:
            browser.get(url)

            def find(selector: str):
                return browser.find_element(By.CSS_SELECTOR, selector)

            find("input[type=file]").send_keys(str(Path(image).absolute()))
            WebDriverWait(browser, 10).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".frame"))
            find("textarea").send_keys(Keys.CONTROL, "a", Keys.NULL, prompt)
            find("#ask").click()
            WebDriverWait(browser, 60).until(lambda _: " in " in find("#status").text)  # 5 tokens in 0.2 s
            answers.append(find(".answer").get_attribute("textContent"))
    finally:
        browser.quit()
    return answers


def main() -> int:
    """Reads the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("images", nargs="+")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--prompt", default="A picture of")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "magma_jax.serve", "--checkpoint", arguments.checkpoint, "--port", str(port)]
    server = subprocess.Popen([*command, "--template", "raw"])  # the other interfaces have no templates
    asked = (arguments.images, arguments.prompt)
    try:
        found = {
            "command line": by_command_line(arguments.checkpoint, *asked),
            "python": by_python(arguments.checkpoint, *asked),
        }
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health")
                break
            except OSError:
                time.sleep(0.2)
        found["server"] = by_server(url, *asked)
        found["page"] = by_page(url, *asked)
    finally:
        server.terminate()
        server.wait()
    rows = []
    for i, image in enumerate(arguments.images):
        said = {way: " ".join(answers[i].split()) for way, answers in found.items()}
        rows.append({"picture": image, "same": len(set(said.values())) == 1, **said})
    print(json.dumps(rows, indent=1, ensure_ascii=False))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

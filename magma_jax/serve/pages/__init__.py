"""The web pages, each one file for the browser."""

from importlib import resources

# Comments in a page, and the files that stand in their place.
_SHARED = {"/* base.css */": "base.css", "// base.js": "base.js"}


def read_page(name: str) -> str:
    """A page with the style and the script that all pages share."""
    folder = resources.files("magma_jax.serve.pages")
    text = (folder / name).read_text(encoding="utf-8")
    for comment, file in _SHARED.items():
        text = text.replace(comment, (folder / file).read_text(encoding="utf-8").strip())
    return text

"""Self-contained HTML pages with a common head and style."""

from html import escape
from importlib import resources
from string import Template


def fill_page(name: str, title: str, **parts: str) -> str:
    """The page ``name``.html of this package.

    Args:
        name: name of the template.
        title: title as plain text.
        parts: HTML for the template's ``$`` placeholders.
    """
    title = escape(title)
    body = fill(name, title=title, **parts)
    style = resources.files("magma_jax.evaluation.report").joinpath("page.css").read_text(encoding="utf-8")
    return _template("page.html").substitute(title=title, style=style, kind=name, body=body)


def fill(name: str, **parts: str) -> str:
    """A part of a page: the template ``name``.html with HTML for its ``$`` placeholders."""
    return _template(f"{name}.html").substitute(parts)


def _template(name: str) -> Template:
    return Template(resources.files("magma_jax.evaluation.report").joinpath(name).read_text(encoding="utf-8"))

"""The site of the documentation: `make docs`, or `sphinx-build --fail-on-warning docs build/docs`."""

import dataclasses
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.util.inspect import stringify_signature

sys.path.insert(0, str(Path(__file__).parent.parent))  # also where the package is not installed

from magma_jax.version import __version__

# The reference is made of docstrings, so modules are imported; no device is asked for anything.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "magma_jax"
author = "the magma_jax developers"
release = __version__
copyright = "Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__"}
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"magma_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def _as_on_the_site(app: Any, name: Path, parent: str, content: list[str]) -> None:
    """Links of the pages that lie outside of docs/ lead to their places in the site."""
    text = re.sub(r"\]\(examples/\w+\.py\)", "](examples.md)", content[0])
    text = re.sub(r"\]\(docs/", "](", text)
    content[0] = re.sub(r"\]\(CHANGELOG\.md\)", "](changelog.md)", text)


def _short_defaults(app: Any, what: str, name: str, obj: Any, *_: Any) -> tuple[str, None] | None:
    """The signature of a dataclass whose defaults are dataclasses themselves: their types are enough."""
    if what != "class" or not dataclasses.is_dataclass(obj):
        return None
    parameters = []
    for parameter in inspect.signature(obj).parameters.values():
        default = parameter.default
        if dataclasses.is_dataclass(default):
            parameter = parameter.replace(default=_Shown(f"{type(default).__name__}()"))
        elif "factory" in repr(default):
            parameter = parameter.replace(default=_Shown("..."))
        parameters.append(parameter)
    return stringify_signature(inspect.Signature(parameters), unqualified_typehints=True, short_literals=True), None


class _Shown(str):
    """Text that stands for a value."""

    __repr__ = str.__str__


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("include-read", _as_on_the_site)
    app.connect("autodoc-process-signature", _short_defaults)

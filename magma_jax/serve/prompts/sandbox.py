"""Jinja for templates of others, with the same restrictions as in transformers.

No Python internals, immutable arguments, bounded ranges and output, and only the globals named here.
"""

import json
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from magma_jax.output import error_line
from magma_jax.serve.errors import RequestError

# Limit on a template's output in characters; far more than a prompt can hold.
MAX_WRITTEN = 4 * 2**20


class TemplateError(ValueError):
    """Template that cannot be read or run; one line."""


class _Generation(Extension):
    """The tag ``generation`` of published templates, which marks what the model writes; it has no effect here."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own attribute

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def sandbox(undefined: type[jinja2.Undefined]) -> jinja2.Environment:
    """The environment of templates; ``undefined`` is what unknown variables become."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], undefined=undefined
    )
    made.globals = {"range": made.globals["range"], "namespace": _Namespace, "raise_exception": _raise}
    made.filters["tojson"] = _tojson
    return made


def compiled(environment: jinja2.Environment, source: str, name: str) -> jinja2.Template:
    """The template of ``source``.

    Raises:
        TemplateError: not Jinja.
    """
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{name}: line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise TemplateError(f"{name}: nested too deep") from None


def rendered(template: jinja2.Template, owner: str, variables: dict[str, Any]) -> str:
    """What a template writes; ``owner`` names it in errors.

    Raises:
        RequestError: it fails, or writes more than ``MAX_WRITTEN`` characters.
    """
    written, size = [], 0
    try:
        for piece in template.generate(**variables):
            written.append(piece)
            size += len(piece)
            if size > MAX_WRITTEN:
                raise RequestError(f"the template writes more than {MAX_WRITTEN} characters")
    except RequestError:
        raise
    except Exception as error:  # a template may raise anything
        raise RequestError(f"{owner} cannot take these messages ({error_line(error):.200})") from None
    return "".join(written)


class _Namespace(jinja2.utils.Namespace):
    """Namespace without dunder names such as ``__class__``, which Jinja's own accepts."""

    def __init__(*arguments: Any, **attributes: Any):
        for name in dict(*arguments[1:], **attributes):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*arguments, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"namespace: {name!r} is no name, or begins with an underscore")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

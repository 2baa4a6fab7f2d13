"""Request fields for structured outputs: OpenAI's ``response_format`` and vLLM's fields."""

# Field types are created by calls, which pydantic supports and type checkers do not.
# pyright: reportInvalidTypeForm=false

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from magma_jax.inference.batching.engine import Engine
from magma_jax.inference.structured.constraints import Constraint, ConstraintError
from magma_jax.inference.structured.grammars import Grammar
from magma_jax.serve.errors import RequestError
from magma_jax.serve.requests.unserved import Name, Strict, unserved

# Far above what the length of a constraint allows; bounds the work before the length is checked.
MAX_TEXTS = 20_000


class TextFormat(Strict):
    """Unconstrained text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """Schema in OpenAI's format; enforced whether ``strict`` or not."""

    name: Name | None = None
    description: str | None = None
    schema_: Annotated[Any, Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


_Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
_FORMS = "JSON schemas, choices and regular expressions are"
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]


class StructuredOutputs(Strict):
    """vLLM's newer format; exactly one of the first four fields."""

    json_: Annotated[Any, Field(alias="json")] = None
    json_object: bool | None = None
    choice: _Texts | None = None
    regex: str | None = None
    grammar: unserved(_FORMS) = None
    structural_tag: unserved(_FORMS) = None
    whitespace_pattern: unserved(_FORMS) = None
    # Accepted without effect, since answers always have these properties, see ``inference.structured.constraints``.
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        if sum(one is not None for one in (self.json_, self.json_object or None, self.choice, self.regex)) != 1:
            raise ValueError("give exactly one of json, json_object, choice and regex")
        return self

    def constraint(self) -> Constraint:
        """Constraint on the answer; errors as of ``Constraint``."""
        if self.choice is not None:
            return Constraint.choice(self.choice)
        if self.regex is not None:
            return Constraint.regex(self.regex)
        return Constraint.json_object() if self.json_ is None else Constraint.json_schema(self.json_)


class StructuredFields(Strict):
    """Structured output fields of a request, of which at most one is set."""

    response_format: _Format | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_choice: _Texts | None = None
    guided_regex: str | None = None
    guided_grammar: unserved(_FORMS) = None
    guided_whitespace_pattern: unserved(_FORMS) = None
    guided_decoding_backend: Name | None = None

    @property
    def forms(self) -> list[str]:
        """Names of the fields that are set."""
        makers = [name for name in _MAKERS if getattr(self, name) is not None]
        return [name for name in makers if not isinstance(getattr(self, name), TextFormat)]

    def grammar(self, engine: Engine) -> Grammar:
        """Compiles the constraint, within a second. Only for requests that have one.

        Raises:
            RequestError: more than one constraint, or an unsupported one; names the field.
        """
        field, *more = self.forms
        if more:
            raise RequestError(f"{field} and {more[0]}: an answer has one form", param=more[0])
        try:
            return engine.compile(_MAKERS[field](getattr(self, field)))
        except ConstraintError as error:
            raise RequestError(f"{field}: {error}", param=field) from None


def _of_format(form: ObjectFormat | SchemaFormat) -> Constraint:
    if isinstance(form, ObjectFormat):
        return Constraint.json_object()
    return Constraint.json_schema(form.json_schema.schema_)


_MAKERS = {
    "response_format": _of_format,
    "structured_outputs": StructuredOutputs.constraint,
    "guided_json": Constraint.json_schema,
    "guided_choice": Constraint.choice,
    "guided_regex": Constraint.regex,
}

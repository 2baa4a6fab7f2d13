"""Constraints on answers: JSON of a schema, one of several texts, or a match of a regular expression.

A constraint is compiled for a tokenizer (``inference.structured.grammars``) and then gives the allowed tokens at every
step.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from typing import Any, Literal

# Maximum length of a constraint in characters: published schemas of this size compile within tens of milliseconds.
MAX_LENGTH = 64 * 1024

# JSON is written on one line, with or without a space after commas and colons: with arbitrary white space a model may
# repeat it until its limit.
_JSON_STYLE = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}

# Keywords that combine schemas: next to each other, or to keywords about keys, both sides must match.
_COMBINING = frozenset({"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas"})
_OF_KEYS = frozenset({"properties", "patternProperties", "additionalProperties", "required", "minProperties"})

# Keywords whose values are schemas by name; the names themselves are not keywords.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})

# Keywords whose values are data, even if they look like schemas.
_DATA = frozenset({"const", "enum", "default", "example", "examples"})


class ConstraintError(ValueError):
    """A constraint that cannot be enforced; the message is one line for the caller."""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A constraint on an answer; created by ``json_schema``, ``json_object``, ``choice`` or ``regex``.

    The generated text may begin with an extra space, since a prompt that ends in ``A:`` is naturally continued by
    ``" red"``. That space is removed from the answer. It is not added if the texts or the expression begin with one.

    Attributes:
        kind: kind of the constraint.
        source: the schema or the texts as JSON, or the expression.
    """

    kind: Literal["json", "choice", "regex"]
    source: str

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | str | bool) -> "Constraint":
        """JSON that matches a schema (draft 2020-12), with keys in the schema's order.

        An object that lists its properties has no others, unless the schema allows them or combines parts (allOf).

        Args:
            schema: parsed, or as JSON.

        Raises:
            ConstraintError: not a schema, or one that is too large.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(_bounded(schema))
            except (ValueError, RecursionError) as error:
                raise ConstraintError(f"the schema is no JSON ({error!s:.100})") from None
        if not isinstance(schema, dict | bool):
            raise ConstraintError(f"a schema is an object, not {json.dumps(schema):.40}")
        try:
            source = _bounded(json.dumps(schema, separators=(",", ":"), allow_nan=False))
        except ConstraintError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise ConstraintError(f"the schema is no JSON, or too deep ({error!s:.100})") from None
        return cls("json", source if isinstance(schema, bool) else json.dumps(_closed(json.loads(source))))

    @classmethod
    def json_object(cls) -> "Constraint":
        """Any JSON object."""
        return cls("json", '{"type": "object"}')

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Constraint":
        """One of these texts, verbatim.

        Raises:
            ConstraintError: no texts, an empty one, or too many.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ConstraintError("give a list of texts to choose from, none of them empty")
        return cls("choice", _bounded(json.dumps(list(dict.fromkeys(texts)))))

    @classmethod
    def regex(cls, pattern: str) -> "Constraint":
        r"""A text that fully matches a regular expression, in the syntax of Rust's regex library.

        That is Python's syntax without look-around, back references and ``\b``.

        Raises:
            ConstraintError: too long.
        """
        return cls("regex", _bounded(pattern))

    @property
    def begins_with_space(self) -> bool | None:
        """Whether an answer itself may begin with a space; None if only the compiled expression can tell."""
        if self.kind == "regex":
            return None
        return self.kind == "choice" and any(text.startswith(" ") for text in json.loads(self.source))

    def grammar(self, *, space: bool) -> str:
        """The constraint in llguidance's notation.

        Args:
            space: whether an extra space may precede the answer.
        """
        start = 'start: " "? body\n' if space else "start: body\n"
        if self.kind == "choice":
            return f"{start}body: BODY\nBODY: {' | '.join(map(json.dumps, json.loads(self.source)))}"
        if self.kind == "regex":
            from llguidance import regex_to_lark

            return f"{start}body: BODY\nBODY: /{regex_to_lark(self.source, '')}/"
        schema = json.loads(self.source)
        if isinstance(schema, dict):
            schema["x-guidance"] = _JSON_STYLE
        return f"{start}body: %json {json.dumps(schema)}"


def installed() -> bool:
    """Whether llguidance, which enforces constraints, is installed."""
    return importlib.util.find_spec("llguidance") is not None


def _bounded(source: str) -> str:
    if len(source) > MAX_LENGTH:
        raise ConstraintError(f"it has {len(source)} characters, at most {MAX_LENGTH} are taken")
    return source


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Sets ``additionalProperties: false`` in objects that list their properties and do not set it; returns the schema.

    Matches of the result also match the original; without it a model would keep inventing keys. A schema in which two
    parts must match the same object is unchanged, since one part would forbid the other's keys.
    """
    nodes = _nodes(schema)
    if any(_intersects(node) for node in nodes):
        return schema
    for node in nodes:
        named = node.get("properties")
        if not isinstance(named, dict) or {"additionalProperties", "patternProperties"} & node.keys():
            continue
        required, least = node.get("required", []), node.get("minProperties", 0)
        # Keys that are required but not described, or more keys than are described, must be additional ones.
        if isinstance(required, list) and set(map(str, required)) <= named.keys() and least in range(len(named) + 1):
            node["additionalProperties"] = False
    return schema


def _intersects(node: dict[str, Any]) -> bool:
    combining = _COMBINING & node.keys()
    if combining & {"allOf", "not", "if", "dependentSchemas"}:
        return True
    return len(combining) > 1 or bool(combining and _OF_KEYS & node.keys())


def _nodes(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """All subschemas of a schema that are objects, itself included."""
    found: list[dict[str, Any]] = []
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            found.append(node)
            for key, value in node.items():
                named = key in _NAMED and isinstance(value, dict)
                if key not in _DATA:
                    waiting.append(list(value.values()) if named else value)
    return found

"""Schemas of somebody who means harm: a few hundred bytes that take minutes, overflow a stack or have no answer."""

from collections.abc import Callable


def _nested(depth: int) -> dict:
    schema: dict = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _chained(count: int, link: Callable[[dict], dict]) -> dict:
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$defs": {**definitions, f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}


# The schema, and what is said of it.
SCHEMAS = {
    "deep": (_nested(400), "recursion limit"),
    "a chain of unions": (_chained(700, lambda ref: {"anyOf": [ref, {"type": "null"}]}), "nested too deeply"),
    "a chain of objects": (_chained(700, lambda ref: {"type": "object", "properties": {"a": ref}}), "too deeply"),
    "many patterns at once": (
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}c"} for i in range(1, 60)]},
        "it takes",
    ),
    "counts": ({"allOf": [{"type": "string", "pattern": f"a{{{i},}}b"} for i in range(1, 100)]}, "it takes"),
    "a large divisor": ({"type": "integer", "multipleOf": 1000003}, "it takes"),
    "patterns of names": (
        {
            "type": "object",
            "patternProperties": {f"^{i * 7919 % 99991}x": {"type": "string"} for i in range(900)},
        },
        "it takes",
    ),
    "products": ({"allOf": [{"anyOf": [{"pattern": f"{i}{j}"} for j in range(8)]} for i in range(8)]}, "too large"),
    "itself": ({"allOf": [{"$ref": "#"}]}, "allows no token"),
    "itself further on": (
        {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]},
        "allows no token",
    ),
    "what it is not": ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
    "elsewhere": ({"$ref": "http://127.0.0.1/schema.json"}, "is not present in a registry"),
    "no type": ({"type": "colour"}, "Invalid type: colour"),
    "bounds": ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable schema"),
    "large": ({"enum": [str(i) * 9 for i in range(5_000)]}, "at most 65536 are taken"),
}

"""Writes docs/settings.md: every field of every config that a run may have, from the dataclasses.

python scripts/config_reference.py
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from magma_jax.families import FAMILIES
from magma_jax.training.run.config import RunConfig

PAGE = Path(__file__).parent.parent / "docs/settings.md"

HEAD = """# Settings

Every setting of a run, written by `python scripts/config_reference.py` from the dataclasses that read a config file.
`--set` takes them by their dotted names, as in `--set optim.groups.encoder=frozen "data.buckets=(8, 16)"`;
`train.py --show` prints those of one run. Where several classes may stand, the field `kind` tells them apart.
"""


def reference() -> str:
    """The page."""
    families = FAMILIES.values()
    places: dict[type, list[str]] = {RunConfig: [""]}
    roots = {
        "model": [config for family in families for config in family.configs],
        "data": [config for family in families for config in family.data],
        "loss": [family.options for family in families],
    }
    _collect(RunConfig, "", places)
    for name, classes in roots.items():
        for cls in dict.fromkeys(classes):
            places.setdefault(cls, []).append(name)
            _collect(cls, name, places)
    # Fields of a run whose type depends on its family.
    own = {name: " or ".join(map(_link, dict.fromkeys(classes))) for name, classes in roots.items()}
    parts = [HEAD, *(_section(cls, where, own if cls is RunConfig else {}) for cls, where in places.items())]
    return "\n".join(parts)


def _collect(cls: type, place: str, places: dict[type, list[str]]) -> None:
    """Adds the configs in the fields of ``cls``, with where they stand."""
    for name, hint in _hints(cls).items():
        for inner in _classes(hint):
            where = f"{place}.{name}" if place else name
            known = inner in places
            if where not in places.setdefault(inner, []):
                places[inner].append(where)
            if not known:
                _collect(inner, where, places)


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]


def _classes(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for inner in typing.get_args(hint):
        yield from _classes(inner)


def _section(cls: type, where: list[str], own: dict[str, str]) -> str:
    described = _meanings(cls)
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        kind = own.get(field.name) or _type(_hints(cls)[field.name])
        meaning = "names this class in a config file." if field.name == "kind" else described.get(field.name)
        if not meaning:
            raise ValueError(f"{cls.__module__}.{cls.__name__}: no line for {field.name} below Attributes:")
        rows.append(f"| `{field.name}` | {kind} | {_default(field)} | {meaning} |")
    summary = _markdown(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0])
    stands = f"Stands in {', '.join(f'`{place}`' for place in where)}. " if where != [""] else ""
    return f"## {cls.__name__}\n\n{stands}{summary}\n\n" + "\n".join(rows) + "\n"


def _meanings(cls: type) -> dict[str, str]:
    """Field to its description, from the docstrings of a class and those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        doc = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        if "Attributes:" in doc:
            text = doc.partition("Attributes:")[2].split("\n\n")[0]
            for name, meaning in re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", text, re.M):
                found[name] = _markdown(meaning)
    return found


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, args))
    if origin is typing.Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        inner = dict.fromkeys(_type(arg) for arg in args if arg is not Ellipsis)
        return f"tuple of {', '.join(inner)}"
    if origin is dict:
        return f"mapping of {_type(args[0])} to {_type(args[1])}"
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _link(hint)
    return f"`{getattr(hint, '__name__', str(hint))}`"


def _link(cls: type) -> str:
    return f"[{cls.__name__}](#{cls.__name__.lower()})"


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
        return "its own defaults" if dataclasses.is_dataclass(value) else f"`{value!r}`"
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return "its own defaults" if dataclasses.is_dataclass(value) else f"`{value!r}`"
    return "required"


if __name__ == "__main__":
    PAGE.write_text(reference())

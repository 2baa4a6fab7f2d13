"""The layers of the package hold: imports go down, rooms of one layer form no circle, no room is crowded."""

import ast
import collections
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("rooms", ROOT / "scripts/rooms.py")
rooms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rooms)

FILES = rooms.modules()
GRAPH = rooms.imports(FILES)


def test_no_import_goes_up():
    up = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if rooms.layer(other) > rooms.layer(name)
    ]
    assert not up


def test_rooms_of_one_layer_form_no_circle():
    below = collections.defaultdict(set)
    for name, others in GRAPH.items():
        for other in others:
            if rooms.layer(name) == rooms.layer(other) and rooms.room(name) != rooms.room(other):
                below[rooms.room(name)].add(rooms.room(other))

    def visit(room, path):
        assert room not in path, f"a circle: {' -> '.join([*path[path.index(room) :], room])}"
        for other in below[room]:
            visit(other, [*path, room])

    for room in list(below):
        visit(room, [])


def test_no_room_is_crowded():
    counts = collections.Counter(file.parent.relative_to(ROOT).as_posix() for file in FILES.values())
    crowded = {folder: count for folder, count in counts.items() if count > 16}
    assert not crowded


def test_an_unknown_room_is_named():
    with pytest.raises(ValueError, match="its room stands in no layer"):
        rooms.layer("magma_jax.cellar.wine")


# What a family is called in code. "language" is a word of its own; its package is found by imports.
NAMES = re.compile(r"(?<![a-z])magma(?!_jax)", re.IGNORECASE)
# Where models, their published layouts and their families live; convert's commands write and read those layouts.
OF_FAMILIES = ("families", "models", "published", "convert")
# Elsewhere, each with its reason.
NAMED = {
    "magma_jax": "the public names",
    "magma_jax.__main__": "the name of the command",
    "magma_jax.data.readers": "the format of the original's datasets",
    "magma_jax.data.readers.folders": "the format of the original's datasets",
    "magma_jax.serve.command": "what a model without a name is called, part of the interface over the wire",
    "magma_jax.serve.config": "what a model without a name is called, part of the interface over the wire",
    "magma_jax.serve.prometheus": "prefix of the counters, part of the interface over the wire",
    "magma_jax.evaluation.report.paper": "the paper's own table",
}


def family_names(file):
    """Names and texts of a module's code, docstrings and comments left out, that say what a family is called."""
    tree = ast.parse(file.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found = [node.value]
        elif isinstance(node, ast.Name):
            found = [node.id]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found = [node.name]
        else:
            continue
        yield from (text for text in found if NAMES.search(text) or ".families." in text)


def test_only_rooms_of_families_name_one():
    naming = {
        name
        for name, file in FILES.items()
        if name.partition(".")[2].split(".")[0] not in OF_FAMILIES and any(family_names(file))
    }
    assert naming == NAMED.keys()

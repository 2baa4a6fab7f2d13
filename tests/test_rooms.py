"""The layers of the package hold: imports go down, rooms of one layer form no circle, no room is crowded."""

import collections
import importlib.util
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

"""GCompris' photographs; the containers were written by Qt's ``rcc``, one with a compressed member."""

import shutil
import struct
from pathlib import Path

import pytest

from magma_jax.data import readers
from magma_jax.data.format.records import DataError
from magma_jax.data.readers.gcompris import resources, spoken

CONTAINERS = Path(__file__).parent.parent / "fixtures/gcompris"
COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2010 Somebody
           2014 Somebody else
License: GPL-3+

Files: src/activities/lang/lang.svg
       src/activities/lang/resource/words_sample/*
Copyright: Many
License: CC-BY-SA-4.0

Files: src/activities/categorization/resource/images/tools/screwDriver3.jpg
Copyright: Her
License: public-domain
Comment: https://example.org/driver.jpg
"""


@pytest.fixture
def share(tmp_path):
    (tmp_path / "doc/gcompris-qt-data").mkdir(parents=True)
    (tmp_path / "doc/gcompris-qt-data/copyright").write_text(COPYRIGHT)
    shutil.copytree(CONTAINERS, tmp_path / "gcompris-qt/rcc")
    return tmp_path


def test_names_and_licences_of_files(share):
    found = {record.id: record for record in readers.read("gcompris", share)}
    assert {name: record.captions for name, record in found.items()} == {
        "words/gorilla": ("gorilla",),
        "words/orange-color": ("orange color",),
        "tools/screwDriver3": ("screw driver",),
    }
    assert all(record.image_bytes()[:4] == b"RIFF" for record in found.values())
    assert found["tools/screwDriver3"].metadata == {
        "group": "tools",
        "copyright": "Her",
        "license": "public-domain",
        "source": "https://example.org/driver.jpg",
    }
    assert found["words/gorilla"].metadata == {"group": "words", "copyright": "Many", "license": "CC-BY-SA-4.0"}
    assert spoken("leaningTowerOfPisa") == "leaning tower of pisa"


def test_compressed_members_are_unpacked():
    found = resources(CONTAINERS / "lang.rcc")
    (script,) = (content for name, content in found.items() if name.endswith("lang.js"))
    assert script == b"// not an image\n" * 40


def _edit(path, offset, content):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


def test_damaged_containers_are_one_line(share):
    path = share / "gcompris-qt/rcc/lang.rcc"
    whole = path.read_bytes()
    tree = struct.unpack_from(">I", whole, 8)[0]
    damages = [
        (lambda: path.write_bytes(whole[:300]), r"lang\.rcc: (is damaged or cut short|ends before)"),
        (lambda: _edit(path, 0, b"RIFF"), r"lang\.rcc: is not a Qt resource file"),
        (lambda: _edit(path, 4, struct.pack(">I", 9)), r"lang\.rcc: is not a Qt resource file of version 2 or 3"),
        (lambda: _edit(path, tree + 6, struct.pack(">II", 2, 0)), r"its tree has a loop"),
        (lambda: path.unlink(), r"lang\.rcc: no such file"),
        (lambda: (share / "doc/gcompris-qt-data/copyright").unlink(), r"list of licences is missing; give the share"),
    ]
    for damage, message in damages:
        path.write_bytes(whole)
        damage()
        with pytest.raises(DataError, match=message) as caught:
            list(readers.read("gcompris", share))
        assert "\n" not in str(caught.value)

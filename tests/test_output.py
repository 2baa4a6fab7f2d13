"""Output that appears when it is whole, one writer at a time."""

import fcntl
import os
from pathlib import Path

import pytest

from magma_jax.output import OutputError, check_room, error_line, printable, size_text, whole_output


def test_an_address_becomes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("gs://bucket/run", Path("az://bucket/run")):
        with pytest.raises(OutputError, match=r"://bucket/run: not a local path"), whole_output(address):
            pass
    assert not list(tmp_path.iterdir())
    with whole_output(Path("a:b/c")) as partial:
        partial.touch()


def test_what_a_terminal_may_be_given():
    tongues = "caf\u00e9 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469 tab\tline\n"
    assert printable(tongues) == tongues
    assert printable("\x1b[2J\x00\x7f\x9b\r\u202e\u2066\ud800") == (
        "\\u001b[2J\\u0000\\u007f\\u009b\\u000d\\u202e\\u2066\\ud800"
    )


def test_an_error_is_one_line():
    assert error_line(ValueError("a\n  b\r\n\x1b[31m  two  spaces")) == "a b \\u001b[31m  two  spaces"
    assert error_line(FileNotFoundError(2, "No such file", "x\ny\x07")) == "x y\\u0007: No such file"
    assert error_line(PermissionError(13, "Permission denied", b"\xff")) == "\\udcff: Permission denied"
    assert error_line(OSError(9, "Bad file descriptor", 3)) == "[Errno 9] Bad file descriptor: 3"
    assert error_line(ValueError()) == "ValueError"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_old_one_when_it_is_whole(tmp_path):
    (tmp_path / "x").write_text("old")
    with whole_output(tmp_path / "x") as partial:
        partial.write_text("new")
        assert (tmp_path / "x").read_text() == "old"
    assert (tmp_path / "x").read_text() == "new"


def test_an_error_leaves_the_old_file(tmp_path):
    def fail():
        with whole_output(tmp_path / "x") as partial:
            partial.write_text("half")
            raise RuntimeError

    (tmp_path / "x").write_text("new")
    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "x").read_text() == "new"
    assert names(tmp_path) == ["x"]


def test_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "deep/new"):
        with whole_output(tmp_path / name) as partial:
            partial.mkdir()
            (partial / "a").write_text("a")
        assert names(tmp_path / name) == ["a"]
    with pytest.raises(OutputError, match="already exists and is not an empty folder"), whole_output(tmp_path / "deep"):
        pass


def test_what_a_killed_process_left_is_removed(tmp_path):
    with whole_output(tmp_path / "x") as partial:
        left = partial.name
        partial.write_text("whole")
    (tmp_path / left).mkdir()
    (tmp_path / left / "half").write_text("half")
    (tmp_path / ".x.lock").touch()  # a lock goes with the process that held it, its file does not
    with whole_output(tmp_path / "x") as partial:
        assert not partial.exists()
        partial.write_text("again")
    assert names(tmp_path) == ["x"]


def test_two_writers_of_one_output(tmp_path):
    with whole_output(tmp_path / "x") as partial:
        partial.write_text("first")
        with pytest.raises(OutputError, match="another process is writing"), whole_output(tmp_path / "x"):
            pass
        with whole_output(tmp_path / "y") as other:
            other.write_text("y")
    assert names(tmp_path) == ["x", "y"]


def test_a_lock_whose_file_was_removed_locks_nothing(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def remove_first(descriptor, operation):
        flock(descriptor, operation)
        if not calls:
            os.unlink(tmp_path / ".x.lock")
        calls.append(descriptor)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with whole_output(tmp_path / "x") as partial:
        assert (tmp_path / ".x.lock").exists()
        partial.write_text("x")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (4_100, "4.1 kB"), (2_850_000, "2.9 MB"), (12_600_000_000, "12.60 GB")],
)
def test_sizes_have_a_unit_that_fits(nbytes, text):
    assert size_text(nbytes) == text


def test_no_room(tmp_path):
    with pytest.raises(OutputError, match=r"1000000000\.00 GB are needed, but only .* GB are free"):
        check_room(tmp_path, 10**18)
    with pytest.raises(OutputError, match="are needed"), whole_output(tmp_path / "x", nbytes=10**18):
        pass
    assert names(tmp_path) == []

"""Conversion: whole or not there, the same after an interruption, and honest about what it left out."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from magma_jax.data import convert as module
from magma_jax.data.convert import ConvertOptions, convert
from magma_jax.data.prepare import PrepareOptions
from magma_jax.data.readers import READERS
from magma_jax.data.records import DataError, FileSlice, Question, Record, Skipped, pack, unpack
from magma_jax.data.stored import StoredRecords
from tests import datafolders

HERE = ConvertOptions(workers=0, shard_records=3)


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures that look different, as files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        coarse = np.random.default_rng(i).integers(0, 256, (8, 9, 3), np.uint8)
        Image.fromarray(coarse).resize((72, 64), Image.Resampling.NEAREST).save(folder / f"{i}.jpg", quality=95)
        (folder / f"{i}.txt").write_text(f"picture {i}\nnumber {i}\n")
    return folder


def records_of(folder):
    return READERS["folder"](folder, None)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_record_survives_storage():
    question = Question("q", "What?", ("a", "b"), {"types": {"structural": "query"}})
    record = Record("1", b"picture", ("one", "zwei \u00fc"), (question,), {"width": 3, "boxes": [[-1, 2.5]]})
    assert unpack(pack(record)) == record
    with pytest.raises(DataError, match="not a stored record"):
        unpack(b"\x00rubbish")


def test_a_folder_is_converted_and_left_as_it_was(pictures, tmp_path):
    before = files_of(pictures)
    info = convert(records_of(pictures), tmp_path / "out", HERE, source={"format": "folder"})
    assert (info["records"], info["captions"], info["questions"]) == (10, 20, 0)
    assert list(info["files"].values()) == [3, 3, 3, 1]
    stored = StoredRecords(tmp_path / "out")
    assert [stored[row].id for row in range(len(stored))] == [str(i) for i in range(10)]
    assert stored[4].captions == ("picture 4", "number 4")
    assert stored[4].image == before["4.jpg"]
    assert stored.texts.tolist() == [[2, 0]] * 10
    assert files_of(pictures) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]


def test_texts_are_read_without_pictures(pictures, tmp_path):
    convert(records_of(pictures), tmp_path / "out", HERE)
    text = StoredRecords(tmp_path / "out").text(4)
    assert (text.id, text.captions, text.image) == ("4", ("picture 4", "number 4"), b"")


def test_any_generator_is_converted(tmp_path, pictures):
    """As in the original's README: a generator of pictures and captions, without a length."""

    def mine():
        for i in range(4):
            yield Record(f"{i}", FileSlice(str(pictures / f"{i}.jpg")), (f"caption {i}",))

    assert convert(mine(), tmp_path / "mine", HERE)["records"] == 4


def test_worker_processes_give_the_same_files(pictures, tmp_path):
    convert(records_of(pictures), tmp_path / "one", HERE)
    convert(records_of(pictures), tmp_path / "two", dataclasses.replace(HERE, workers=2))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_an_interrupted_conversion_continues_to_the_same_files(pictures, tmp_path, monkeypatch):
    convert(records_of(pictures), tmp_path / "whole", HERE)
    written, original = [], module._write_shard

    def counting(work, number, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return original(work, number, *rest)

    monkeypatch.setattr(module, "_write_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        convert(records_of(pictures), tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()
    written.clear()
    monkeypatch.setattr(module, "_write_shard", lambda *a: written.append(a[1]) or original(*a))
    convert(records_of(pictures), tmp_path / "out", HERE)
    assert written == [2, 3]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


KILLED = """
import sys
from pathlib import Path
from magma_jax.data import prepare, convert
from magma_jax.data.readers import READERS
import time
original = convert.prepare
convert.prepare = lambda *a: time.sleep(0.05) or original(*a)
options = convert.ConvertOptions(workers=0, shard_records=1)
convert.convert(READERS["folder"](Path(sys.argv[1]), None), sys.argv[2], options)
"""


def test_killed_at_a_random_moment_and_run_again(pictures, tmp_path):
    options = dataclasses.replace(HERE, shard_records=1)
    convert(records_of(pictures), tmp_path / "whole", options)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(pictures), str(tmp_path / "out")])
    data = tmp_path / ".out.partial" / "data"
    deadline = time.monotonic() + 60
    while not (data.is_dir() and any(data.glob("*.array_record"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    convert(records_of(pictures), tmp_path / "out", options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_another_source_or_other_options_do_not_continue_it(pictures, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_finish", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(records_of(pictures), tmp_path / "out", HERE)
    monkeypatch.undo()
    with pytest.raises(DataError, match="with other options"):
        convert(records_of(pictures), tmp_path / "out", dataclasses.replace(HERE, shard_records=4))
    (pictures / "1.txt").write_text("another caption")
    with pytest.raises(DataError, match="shard 0 are not those of the interrupted conversion"):
        convert(records_of(pictures), tmp_path / "out", HERE)


def test_what_stands_at_the_place_is_kept(pictures, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="already exists"):
        convert(records_of(pictures), tmp_path / "out", HERE)
    assert (tmp_path / "out").read_text() == "mine"


def test_broken_pictures_are_counted_and_named(pictures, tmp_path):
    whole = (pictures / "0.jpg").read_bytes()
    (pictures / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "2.jpg").write_bytes(b"")
    (pictures / "3.jpg").write_bytes(b"<html>not found</html>")
    options = dataclasses.replace(HERE, max_skipped=0.5)
    info = convert(records_of(pictures), tmp_path / "out", options)
    reasons = {"picture damaged": 1, "picture empty": 1, "no picture, or not in a known format": 1}
    assert info["skipped"] == reasons
    report = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert report[0] == {"id": "1", "reason": "picture damaged"}


def test_too_many_broken_pictures_are_an_error_and_cost_nothing(pictures, tmp_path):
    (pictures / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 10 records would be left out \(1 x picture empty\)"):
        convert(records_of(pictures), tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()
    convert(records_of(pictures), tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.1))


def test_a_picture_of_300_megapixels_is_not_decoded(tmp_path):
    picture = Image.new("1", (20_000, 15_000))
    picture.save(tmp_path / "huge.png")
    (tmp_path / "huge.txt").write_text("huge")
    with pytest.raises(DataError, match="1 x picture too large"):
        convert(records_of(tmp_path), tmp_path / "out", HERE)


def test_two_records_of_one_id_are_an_error(pictures, tmp_path):
    records = [Record("same", FileSlice(str(pictures / f"{i}.jpg")), ("c",)) for i in range(2)]
    with pytest.raises(DataError, match="two records have the id 'same'"):
        convert(records, tmp_path / "out", HERE)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing to read"):
        convert([], tmp_path / "out", HERE)


@pytest.mark.parametrize("kind", ["content", "perceptual"])
def test_duplicates_are_left_out_across_shards(pictures, tmp_path, kind):
    (pictures / "7.jpg").write_bytes((pictures / "1.jpg").read_bytes())
    Image.open(pictures / "2.jpg").resize((144, 128)).save(pictures / "8.jpg")  # the same drawing, twice the size
    options = dataclasses.replace(HERE, prepare=PrepareOptions(duplicates=kind))
    info = convert(records_of(pictures), tmp_path / "out", options)
    gone = {"7"} if kind == "content" else {"7", "8"}
    stored = StoredRecords(tmp_path / "out")
    assert {stored[row].id for row in range(len(stored))} == {str(i) for i in range(10)} - gone
    assert info["skipped"] == {"duplicate": len(gone)}
    assert len(stored.texts) == 10 - len(gone)


def test_skips_of_the_reader_are_reported(pictures, tmp_path):
    (pictures / "3.txt").unlink()
    info = convert(records_of(pictures), tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.2))
    assert info["skipped"] == {"picture without an annotation": 1}


def test_a_full_disk_is_one_line_and_can_be_continued(pictures, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises((DataError, OSError), match="No space left"):
        convert(records_of(pictures), tmp_path / "out", HERE)
    monkeypatch.undo()
    assert convert(records_of(pictures), tmp_path / "out", HERE)["records"] == 10


# As on a full disk: the file library itself cannot write on.
FULL = """
import resource, sys
from magma_jax.data import __main__ as command
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
command.main()
"""


def test_a_disk_that_is_full_in_the_middle_of_a_shard(pictures, tmp_path):
    arguments = ["convert", "--from", "folder", str(pictures), str(tmp_path / "out"), "--workers", "0"]
    done = subprocess.run([sys.executable, "-c", FULL, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "records-00000.array_record: cannot be written" in last
    assert "make room and run the same command again" in last
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.partial" / "data").iterdir())
    convert(records_of(pictures), tmp_path / "whole", ConvertOptions(workers=0), source={"format": "folder"})
    assert run(*arguments).returncode == 0
    records = {name for name in files_of(tmp_path / "whole") if name != "info.json"}
    assert all(files_of(tmp_path / name).keys() >= records for name in ("out", "whole"))
    assert all(files_of(tmp_path / "out")[name] == files_of(tmp_path / "whole")[name] for name in records)


def test_one_damaged_picture_in_a_hundred_is_left_out_and_named(tmp_path):
    whole = [datafolders.noise(i) for i in range(10)]

    def records():
        for i in range(200):
            content = whole[i % 10]
            yield Record(str(i), content if i % 100 != 50 else content[:-200], (f"picture {i}",))

    info = convert(records(), tmp_path / "out", ConvertOptions(workers=0))
    assert (info["records"], info["skipped"]) == (198, {"picture damaged": 2})
    report = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in report] == ["50", "150"]


def test_a_data_set_folder_that_lacks_a_file_is_named(pictures, tmp_path):
    convert(records_of(pictures), tmp_path / "out", HERE)
    (tmp_path / "out" / "records-00002.array_record").unlink()
    with pytest.raises(DataError, match=r"records-00002\.array_record is missing \(1 in all\)"):
        StoredRecords(tmp_path / "out")
    with pytest.raises(DataError, match="no data set folder"):
        StoredRecords(pictures)


def test_skipped_records_of_the_input_need_no_picture(tmp_path, pictures):
    records = [Skipped("a", "picture missing"), *records_of(pictures)]
    info = convert(records, tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.1))
    assert info["records"] == 10


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "magma_jax.data", *map(str, arguments)], capture_output=True, text=True
    )


def test_command_line(pictures, tmp_path):
    done = run("convert", "--from", "folder", pictures, tmp_path / "out", "--workers", 0)
    assert done.returncode == 0, done.stderr
    assert "10 records, 20 captions, 0 questions" in done.stdout
    shown = run("show", tmp_path / "out", "--limit", 1)
    assert "picture 0" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--from", "coco", "none.json", "out"), "needs --images"),
        (("--from", "folder", "nowhere", "out"), "nowhere: no such folder"),
        (("--from", "gqa", "x.json", "out", "--images", ".", "--option", "split=val"), "gqa has: balanced"),
        (("--from", "gqa", "x.json", "out", "--images", ".", "--option", "balanced=perhaps"), "expected true or false"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, says, monkeypatch, capsys, tmp_path):
    from magma_jax.data import __main__ as command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["magma_jax.data", "convert", *arguments])
    with pytest.raises(SystemExit) as error:
        command.main()
    assert says in str(error.value)
    assert "\n" not in str(error.value)

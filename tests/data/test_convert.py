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

from magma_jax.data import readers
from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import (
    HIDDEN,
    NOT_DOWNLOADED,
    DataError,
    FileSlice,
    Question,
    Record,
    Skipped,
    pack,
    unpack,
)
from magma_jax.data.write import conversion as module
from magma_jax.data.write import resumable_shards as work_module
from magma_jax.data.write.conversion import ConvertOptions, convert
from magma_jax.data.write.prepare import PrepareOptions
from tests import datafolders

HERE = ConvertOptions(workers=0, shard_records=3)


@pytest.fixture
def images(tmp_path):
    """Ten images that look different, as files."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        coarse = np.random.default_rng(i).integers(0, 256, (8, 9, 3), np.uint8)
        Image.fromarray(coarse).resize((72, 64), Image.Resampling.NEAREST).save(folder / f"{i}.jpg", quality=95)
        (folder / f"{i}.txt").write_text(f"image {i}\nnumber {i}\n")
    return folder


def records_of(folder):
    return readers.read("folder", folder)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_record_survives_storage():
    question = Question("q", "What?", ("a", "b"), {"types": {"structural": "query"}})
    record = Record("1", b"picture", ("one", "zwei \u00fc"), (question,), {"width": 3, "boxes": [[-1, 2.5]]})
    assert unpack(pack(record)) == record
    with pytest.raises(DataError, match="not a stored record"):
        unpack(b"\x00rubbish")


def test_a_folder_is_converted_and_left_as_it_was(images, tmp_path):
    before = files_of(images)
    info = convert(records_of(images), tmp_path / "out", HERE, source={"format": "folder"})
    assert (info["records"], info["captions"], info["questions"]) == (10, 20, 0)
    assert list(info["files"].values()) == [3, 3, 3, 1]
    stored = StoredRecords(tmp_path / "out")
    assert [stored[row].id for row in range(len(stored))] == [str(i) for i in range(10)]
    assert stored[4].captions == ("image 4", "number 4")
    assert stored[4].image == before["4.jpg"]
    assert stored.texts.tolist() == [[2, 0]] * 10
    assert files_of(images) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]


def test_texts_are_read_without_images(images, tmp_path):
    convert(records_of(images), tmp_path / "out", HERE)
    text = StoredRecords(tmp_path / "out").text(4)
    assert (text.id, text.captions, text.image) == ("4", ("image 4", "number 4"), b"")


def test_any_generator_is_converted(tmp_path, images):
    """As in the original's README: a generator of images and captions, without a length."""

    def mine():
        for i in range(4):
            yield Record(f"{i}", FileSlice(str(images / f"{i}.jpg")), (f"caption {i}",))

    assert convert(mine(), tmp_path / "mine", HERE)["records"] == 4


def test_worker_processes_give_the_same_files(images, tmp_path):
    convert(records_of(images), tmp_path / "one", HERE)
    convert(records_of(images), tmp_path / "two", dataclasses.replace(HERE, workers=2))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_an_interrupted_conversion_continues_to_the_same_files(images, tmp_path, monkeypatch):
    convert(records_of(images), tmp_path / "whole", HERE)
    written, original = [], work_module.write_shard

    def counting(work, number, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return original(work, number, *rest)

    monkeypatch.setattr(work_module, "write_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        convert(records_of(images), tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()
    written.clear()
    monkeypatch.setattr(work_module, "write_shard", lambda *a: written.append(a[1]) or original(*a))
    convert(records_of(images), tmp_path / "out", HERE)
    assert written == [2, 3]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


KILLED = """
import sys
from pathlib import Path
from magma_jax.data.readers import read
from magma_jax.data.write import conversion, resumable_shards
import time
original = resumable_shards.prepare
resumable_shards.prepare = lambda *a: time.sleep(0.05) or original(*a)
options = conversion.ConvertOptions(workers=0, shard_records=1)
conversion.convert(read("folder", Path(sys.argv[1])), sys.argv[2], options)
"""


def test_killed_at_a_random_moment_and_run_again(images, tmp_path):
    options = dataclasses.replace(HERE, shard_records=1)
    convert(records_of(images), tmp_path / "whole", options)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(images), str(tmp_path / "out")])
    data = tmp_path / ".out.partial" / "data"
    deadline = time.monotonic() + 60
    while not (data.is_dir() and any(data.glob("*.array_record"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    convert(records_of(images), tmp_path / "out", options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def interrupted(monkeypatch, function, *arguments, at="np.save"):
    """A conversion that comes as far as the call of ``at``."""

    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"{module.__name__}.{at}", fail)
        with pytest.raises(KeyboardInterrupt):
            function(*arguments)


def test_another_source_or_other_options_do_not_continue_it(images, tmp_path, monkeypatch):
    interrupted(monkeypatch, convert, records_of(images), tmp_path / "out", HERE)
    with pytest.raises(DataError, match="with other options"):
        convert(records_of(images), tmp_path / "out", dataclasses.replace(HERE, shard_records=4))
    with pytest.raises(DataError, match="of another source"):
        convert(records_of(images), tmp_path / "out", HERE, source={"format": "coco"})
    assert convert(records_of(images), tmp_path / "out", HERE)["records"] == 10


def test_what_has_changed_in_the_source_since_the_interruption_is_converted_anew(images, tmp_path, monkeypatch):
    """An image repaired, a caption changed, images gone, and one that no longer is a duplicate of another."""
    options = dataclasses.replace(HERE, max_skipped=0.2, prepare=PrepareOptions(duplicates="content"))
    whole = (images / "1.jpg").read_bytes()
    (images / "1.jpg").write_bytes(whole[:-300] + bytes(300))
    (images / "4.jpg").write_bytes((images / "2.jpg").read_bytes())
    interrupted(monkeypatch, convert, records_of(images), tmp_path / "out", options)
    (images / "1.jpg").write_bytes(whole)
    (images / "2.jpg").write_bytes(whole)
    (images / "3.txt").write_text("another caption")
    for gone in (5, 6, 7, 8, 9):
        (images / f"{gone}.jpg").unlink()
    info = convert(records_of(images), tmp_path / "out", options)
    assert (info["records"], info["skipped"]) == (4, {"duplicate": 1})
    convert(records_of(images), tmp_path / "fresh", options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_a_image_that_could_not_be_read_is_tried_again(images, tmp_path, monkeypatch):
    def fail(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(FileSlice, "read", fail)
        with pytest.raises(DataError, match="10 x image cannot be read"):
            convert(records_of(images), tmp_path / "out", HERE)
    assert convert(records_of(images), tmp_path / "out", HERE)["records"] == 10


def test_what_stands_at_the_place_is_kept(images, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="already exists"):
        convert(records_of(images), tmp_path / "out", HERE)
    assert (tmp_path / "out").read_text() == "mine"


def test_broken_images_are_counted_and_named(images, tmp_path):
    whole = (images / "0.jpg").read_bytes()
    (images / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "2.jpg").write_bytes(b"")
    (images / "3.jpg").write_bytes(b"<html>not found</html>")
    options = dataclasses.replace(HERE, max_skipped=0.5)
    info = convert(records_of(images), tmp_path / "out", options)
    reasons = {"image damaged": 1, "image empty": 1, "no image, or not in a known format": 1}
    assert info["skipped"] == reasons
    report = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert report[0] == {"id": "1", "reason": "image damaged", "samples": 1}


def test_too_many_broken_images_are_an_error_and_cost_nothing(images, tmp_path):
    (images / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 10 samples would be left out \(1 x image empty\)"):
        convert(records_of(images), tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()
    convert(records_of(images), tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.1))


def test_a_image_of_300_megapixels_is_not_decoded(tmp_path):
    image = Image.new("1", (20_000, 15_000))
    image.save(tmp_path / "huge.png")
    (tmp_path / "huge.txt").write_text("huge")
    with pytest.raises(DataError, match="1 x image too large"):
        convert(records_of(tmp_path), tmp_path / "out", HERE)


def test_two_records_of_one_id_are_an_error(images, tmp_path):
    records = [Record("same", FileSlice(str(images / f"{i}.jpg")), ("c",)) for i in range(2)]
    with pytest.raises(DataError, match="two records have the id 'same'"):
        convert(records, tmp_path / "out", HERE)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing to read"):
        convert([], tmp_path / "out", HERE)


@pytest.mark.parametrize("kind", ["content", "perceptual"])
def test_duplicates_are_left_out_across_shards(images, tmp_path, kind):
    (images / "7.jpg").write_bytes((images / "1.jpg").read_bytes())
    Image.open(images / "2.jpg").resize((144, 128)).save(images / "8.jpg")  # the same drawing, twice the size
    options = dataclasses.replace(HERE, prepare=PrepareOptions(duplicates=kind))
    info = convert(records_of(images), tmp_path / "out", options)
    gone = {"7"} if kind == "content" else {"7", "8"}
    stored = StoredRecords(tmp_path / "out")
    assert {stored[row].id for row in range(len(stored))} == {str(i) for i in range(10)} - gone
    assert info["skipped"] == {"duplicate": len(gone)}
    assert len(stored.texts) == 10 - len(gone)


def test_skips_of_the_reader_are_reported(images, tmp_path):
    (images / "3.txt").unlink()
    info = convert(records_of(images), tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.2))
    assert info["skipped"] == {"image without an annotation": 1}


def test_a_full_disk_is_one_line_and_can_be_continued(images, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(DataError, match=r"the disk is full .*No space left.*; make room"):
        convert(records_of(images), tmp_path / "out", HERE)
    monkeypatch.undo()
    assert convert(records_of(images), tmp_path / "out", HERE)["records"] == 10


# As on a full disk: the file library itself cannot write on.
FULL = """
import resource, sys
from magma_jax.data import __main__ as command
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.exit(command.main())
"""


def test_a_disk_that_is_full_in_the_middle_of_a_shard(images, tmp_path):
    arguments = ["convert", "--from", "folder", str(images), str(tmp_path / "out"), "--workers", "0"]
    done = subprocess.run([sys.executable, "-c", FULL, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "records-00000.array_record: the disk is full (File too large); make room" in last
    assert "make room and run the same command again" in last
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()  # it has finished nothing
    for name in ("whole", "out"):
        convert(records_of(images), tmp_path / name, ConvertOptions(workers=0))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_disk_without_room_for_a_name_is_one_line(images, tmp_path, monkeypatch):
    """Nothing can be made there, not even the lock; and nothing stays."""

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    for place, says in [("open", "cannot be written (No space left on device)"), ("mkdir", "the disk is full")]:
        with monkeypatch.context() as patch:
            patch.setattr(os, place, full)
            with pytest.raises(ValueError, match="No space left on device") as error:
                convert(records_of(images), tmp_path / "out", HERE)
        assert says in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_when_nothing_is_found_the_names_that_were_looked_for_are_told(images, tmp_path):
    listed = [{"id": i, "file_name": f"no_{i}.jpg"} for i in range(4)]
    said = [{"image_id": i, "caption": "an image"} for i in range(4)]
    (tmp_path / "own.json").write_text(json.dumps({"images": listed, "annotations": said}))
    with pytest.raises(DataError) as error:
        convert(readers.read("coco", tmp_path / "own.json", images), tmp_path / "out", HERE)
    report = tmp_path / ".out.partial" / "data" / "skipped.jsonl"
    assert f"(4 x image missing (looked for no_0.jpg below {images}))" in str(error.value)
    assert f"{report} lists them" in str(error.value)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2", "3"]
    assert lines[3]["detail"] == f"looked for no_3.jpg below {images}"
    assert not (tmp_path / "out").exists()
    for i in range(4):
        (images / f"{i}.jpg").rename(images / f"no_{i}.jpg")
    info = convert(readers.read("coco", tmp_path / "own.json", images), tmp_path / "out", HERE)
    assert (info["records"], info["skipped"]) == (4, {})
    assert (tmp_path / "out" / "skipped.jsonl").read_bytes() == b""


def test_hidden_files_are_no_share_of_the_samples(images, tmp_path):
    for i in range(10):
        (images / f"._{i}.jpg").write_bytes(b"AppleDouble")
    info = convert(records_of(images), tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.0))
    assert (info["records"], info["skipped"]) == (10, {HIDDEN: 10})


def test_one_damaged_image_in_a_hundred_is_left_out_and_named(tmp_path):
    whole = [datafolders.noise(i) for i in range(10)]

    def records():
        for i in range(200):
            content = whole[i % 10]
            yield Record(str(i), content if i % 100 != 50 else content[:-200], (f"image {i}",))

    info = convert(records(), tmp_path / "out", ConvertOptions(workers=0))
    assert (info["records"], info["skipped"]) == (198, {"image damaged": 2})
    report = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in report] == ["50", "150"]


def test_a_data_set_folder_that_lacks_a_file_is_named(images, tmp_path):
    convert(records_of(images), tmp_path / "out", HERE)
    (tmp_path / "out" / "records-00002.array_record").unlink()
    with pytest.raises(DataError, match=r"records-00002\.array_record is missing \(1 in all\)"):
        StoredRecords(tmp_path / "out")
    with pytest.raises(DataError, match="no dataset folder"):
        StoredRecords(images)


def test_a_file_that_is_cut_short_is_named(images, tmp_path):
    convert(records_of(images), tmp_path / "out", HERE)
    for name in ("info.json", "texts.npy", "records-00001.array_record", "texts-00001.array_record"):
        file = tmp_path / "out" / name
        whole = file.read_bytes()
        for kept in (0, 10, len(whole) // 2):
            file.write_bytes(whole[:kept])
            with pytest.raises(DataError, match=r"is damaged|holds \d+ records, not"):
                StoredRecords(tmp_path / "out")
        file.write_bytes(whole)
    (tmp_path / "out" / "info.json").write_text('{"records": 10, "files": []}')
    with pytest.raises(DataError, match=r"info\.json: is damaged"):
        StoredRecords(tmp_path / "out")


def test_what_is_skipped_is_counted_in_samples(tmp_path):
    """An image goes with all that is asked about it."""
    asked = tuple(Question(str(i), "What?", ("it",)) for i in range(3))
    whole = [Record(str(i), datafolders.noise(i), questions=asked) for i in range(3)]
    records = [Skipped("a", "image missing", 3), *whole, Record("b", b"", ("it",), asked)]
    with pytest.raises(DataError, match=r"7 of 16 samples .*\(4 x image empty, 3 x image missing\).*43\.70%"):
        convert(records, tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.437))
    info = convert(records, tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.438))
    assert info["skipped"] == {"image empty": 4, "image missing": 3}
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"id": "a", "reason": "image missing", "samples": 3}


def test_images_that_were_never_downloaded_are_no_fault(tmp_path):
    gone = [Skipped(f"gone {i}", NOT_DOWNLOADED) for i in range(9)]
    whole = [Record("here", datafolders.noise(0), ("an image",))]
    info = convert([*gone, *whole], tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.0))
    assert (info["records"], info["skipped"]) == (1, {NOT_DOWNLOADED: 9})
    with pytest.raises(DataError, match=f"nothing is left to convert \\(9 x {NOT_DOWNLOADED}\\)"):
        convert(gone, tmp_path / "none", HERE)


def test_what_cannot_be_stored_is_counted_and_named(tmp_path):
    """Half of a character, which JSON can name, in a text or in an id; numbers beyond 64 bits."""
    half = json.loads('"\\ud800"')
    whole = [Record(str(i), datafolders.noise(i), (f"image {i}",)) for i in range(4)]
    odd = [
        Record("text", whole[0].image, (f"a cat {half}",)),
        Record(half, whole[0].image, ("a cat",)),
        Record("number", whole[0].image, ("a cat",), metadata={"number": 2**70}),
    ]
    info = convert([*whole, *odd], tmp_path / "out", dataclasses.replace(HERE, max_skipped=0.5), source={"file": half})
    assert info["skipped"]["text is not Unicode"] == 2
    assert sum(info["skipped"].values()) == 3
    report = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in report] == ["text", half, "number"]


@pytest.mark.parametrize(
    "options",
    [
        lambda: ConvertOptions(shard_records=0),
        lambda: ConvertOptions(workers=-1),
        lambda: ConvertOptions(max_skipped=float("nan")),
        lambda: PrepareOptions(max_pixels=0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(DataError, match=r"must be|is a share"):
        options()


@pytest.fixture
def command_line(monkeypatch):
    """The command with these arguments, in this process."""
    from magma_jax.data import __main__ as command

    def run(*arguments):
        return command.main([*map(str, arguments)])

    return run


def test_command_line(images, tmp_path, command_line, capsys):
    (images / "3.jpg").write_bytes(b"")
    command_line("convert", "--from", "folder", images, tmp_path / "out", "--workers", 0, "--max-skipped", 0.1)
    done = capsys.readouterr().out
    assert "9 records, 18 captions, 0 questions" in done
    assert "samples left out: 1 x image empty" in done
    command_line("show", tmp_path / "out", "--limit", 1)
    assert "image 0" in capsys.readouterr().out
    assert command_line("show", tmp_path / "out", "--limit", -1) == 2
    assert "--limit must be 0 or more, got -1" in capsys.readouterr().err


def test_control_characters_of_data_do_not_reach_the_terminal(tmp_path, command_line, capsys):
    r"""``\x1b]0;`` sets a window's title, ``\x9b`` its colours, and U+202E turns the text round."""
    half = json.loads('"\\ud800"')
    said = "a \x1b]0;title\x07 \x9b31m \u202etxt\u2028 caf\u00e9"
    question = Question(f"q{said}", said, (said,), {})
    records = [Record(f"id {said}", datafolders.noise(0), (said,), (question,)), Skipped("x", f"reason {said}", 0)]
    convert(records, tmp_path / "out", HERE, source={"file": f"{said}{half}"})
    capsys.readouterr()
    command_line("show", tmp_path / "out")
    shown = capsys.readouterr().out
    # The source, the reason of a skip, the record, its caption, its question and the answer.
    assert shown.count("\\u001b]0;title\\u0007 \\u009b31m \\u202etxt\\u2028 caf\u00e9") == 6
    assert not set(shown) & set("\x1b\x07\x9b\u202e\u2028")
    assert json.loads(shown.partition("\n\n")[0])["records"] == 1
    (tmp_path / "coco.json").write_text(
        json.dumps({"images": [{"id": said, "file_name": said}] * 2, "annotations": []})
    )
    coco = ("convert", "--from", "coco", tmp_path / "coco.json", tmp_path / "o\x1bo", "--images", tmp_path)
    assert command_line(*coco) == 2
    said = capsys.readouterr().err
    assert "two entries have the id" in said
    assert said.strip().isprintable()
    assert command_line("show", tmp_path / "o\x1bo") == 2
    assert r"o\u001bo: no dataset folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--from", "coco", "none.json", "out"), "needs --images"),
        (("--from", "folder", "nowhere", "out"), "nowhere: no such folder"),
        (("--from", "gqa", "x.json", "out", "--images", ".", "--option", "split=val"), "gqa has: balanced"),
        (("--from", "gqa", "x.json", "out", "--images", ".", "--option", "balanced=perhaps"), "expected true or false"),
        (("--from", "openmoji", "train", "out", "--option", "size=-1"), "expected a whole number above 0"),
        (("--from", "folder", ".", "out", "--workers", "-1"), "workers must be 0 or more, got -1"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, says, monkeypatch, command_line, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert command_line("convert", *arguments) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1

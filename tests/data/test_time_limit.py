"""Images that take long, where a process reads many: interrupted, counted, and the next one is read."""

import signal
import threading
import time

import numpy as np
import pytest

from magma_jax.data.batches.stored_images import ImageOptions, StoredImages
from magma_jax.data.format.records import Record, Skipped
from magma_jax.data.images import ImageError, load_image
from magma_jax.data.time_limit import TimeLimit
from magma_jax.data.write.conversion import ConvertOptions, convert
from magma_jax.data.write.prepare import PrepareOptions, prepare
from tests.data.hostile_images import SLOW, bmp_runs, many_scans, saved
from tests.data.test_decoders import ENDLESS, scene

REASON = "image takes too long to decode"


@pytest.fixture
def quick(monkeypatch):
    """Limits of a tenth of a second."""

    class Quick(TimeLimit):
        def __init__(self, name):
            super().__init__(name, 0.1)

    for module in ("write.prepare", "batches.stored_images"):
        monkeypatch.setattr(f"magma_jax.data.{module}.TimeLimit", Quick)


@pytest.mark.parametrize("name", SLOW)
def test_what_takes_long_is_interrupted(name):
    content = SLOW[name](3_000_000)
    with pytest.raises(ImageError, match=r"'x': takes more than 0\.05 s to decode") as error, TimeLimit("'x'", 0.05):
        load_image(content)
    assert error.value.kind == REASON
    with TimeLimit("y", 0.05):
        load_image(saved(scene(), "PNG"))


def test_only_code_of_pillow_is_interrupted():
    with TimeLimit("x", 0.01):
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass


def test_other_errors_and_later_work_are_left_alone():
    with pytest.raises(ImageError, match="empty"), TimeLimit("x", 0.01):
        load_image(b"")
    with TimeLimit("x", 0.01):
        pass
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    # A signal that comes late.
    signal.raise_signal(signal.SIGPROF)


def test_time_of_other_threads_does_not_count():
    done = threading.Event()

    def work():
        while not done.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    with TimeLimit("x", 0.1):
        time.sleep(0.4)
    done.set()
    for thread in threads:
        thread.join()


def test_other_threads_have_no_limit():
    def work():
        with TimeLimit("x", 0.001):
            found.append(load_image(bmp_runs(10_000, 20, b"\1\0\0\0" * 20)).size)

    found = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(10_000, 20)]


def test_a_scan_too_many_is_refused_before_one_call_decodes_them_all():
    with pytest.raises(ImageError, match="more than 100 scans") as error:
        load_image(many_scans(64, 95))
    assert error.value.kind == REASON
    assert load_image(many_scans(64, 80)).size == (64, 64)


def test_a_conversion_leaves_out_what_takes_long(tmp_path, quick):
    contents = {"a": saved(scene(), "PNG"), "b": ENDLESS, "c": saved(scene(), "JPEG")}
    records = [Record(key, content, ("caption",)) for key, content in contents.items()]
    info = convert(records, tmp_path / "out", ConvertOptions(workers=0, max_skipped=0.5))
    assert info["records"] == 2
    assert info["skipped"] == {REASON: 1}
    assert prepare(records[1], PrepareOptions(check="header"))[1] == ""  # whose head is fine
    slow = Record("d", SLOW["a PNG of profiles"](3_000_000), ("caption",))
    assert prepare(slow, PrepareOptions(check="header")) == Skipped("d", REASON)


def test_training_leaves_out_what_takes_long(tmp_path, quick):
    records = [Record("a", saved(scene(), "PNG"), ("one",)), Record("b", ENDLESS, ("two",))]
    convert(records, tmp_path / "out", ConvertOptions(PrepareOptions(check="header"), workers=0))
    images = StoredImages([tmp_path / "out"], ImageOptions(16))
    pixels, problems = images.load(np.array([0, 1])).result()
    assert problems == {1: REASON}
    assert pixels[0].any()
    assert not pixels[1].any()
    images.close()

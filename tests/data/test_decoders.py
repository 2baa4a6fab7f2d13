"""Images decoded by processes of their own: the same pixels, limits, order, and processes that end."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magma_jax.data.decoders import DecoderBusy, DecoderError, Decoders
from magma_jax.data.images import ImageError, load_image, to_uint8
from tests.data.hostile_images import SLOW, bmp_runs, many_scans, saved

# Work of half an hour; nothing here waits for its end.
ENDLESS = bmp_runs(100_000, 600, b"\1\0\0\0" * 600)
LONG = 2000.0


def scene(width=60, height=44) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 4, y * 5, x + y], -1).astype(np.uint8))


def _with_alpha() -> Image.Image:
    image = scene().convert("RGBA")
    image.putalpha(scene().convert("L"))
    return image


def _files() -> dict[str, bytes]:
    palette, turned = scene().quantize(16), Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.asarray(scene().convert("L")).astype(np.uint16) * 257)
    files = {f"PNG {mode}": saved(scene().convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB")}
    files |= {f"BMP {mode}": saved(scene().convert(mode), "BMP") for mode in ("1", "L", "P", "RGB")}
    files |= {f"JPEG {mode}": saved(scene().convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")}
    return files | {
        "PNG RGBA": saved(_with_alpha(), "PNG"),
        "PNG of 16 bits": saved(deep, "PNG"),
        "PNG with a transparent colour": saved(palette, "PNG", transparency=3),
        "PNG with a transparent palette": saved(palette, "PNG", transparency=bytes([0, 128] + [255] * 14)),
        "PNG to be turned": saved(scene(), "PNG", exif=turned),
        "PNG in motion": saved(scene(), "PNG", save_all=True, append_images=[Image.new("RGB", (60, 44))]),
        "JPEG, progressive": saved(scene(), "JPEG", progressive=True),
        "JPEG to be turned": saved(scene(), "JPEG", exif=turned),
        "WebP": saved(scene(), "WEBP"),
        "WebP with alpha": saved(_with_alpha(), "WEBP", lossless=True),
        "WebP in motion": saved(scene(), "WEBP", save_all=True, append_images=[Image.new("RGB", (60, 44), "red")]),
        "GIF": saved(palette, "GIF"),
        "GIF, grey": saved(scene().convert("L"), "GIF"),
        "GIF with a transparent colour": saved(palette, "GIF", transparency=2),
        "GIF in motion": saved(palette, "GIF", save_all=True, append_images=[scene().convert("L").quantize(4)]),
    }


FILES = _files()


@pytest.fixture(scope="module")
def decoders():
    with Decoders(1, max_pixels=4_200_000, seconds=30.0) as pool:
        yield pool


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_this_process(decoders, name):
    for size in (32, 48):
        expected = to_uint8(load_image(FILES[name]), size)
        np.testing.assert_array_equal(decoders.square(FILES[name], size), expected)
        whole = decoders.image(FILES[name])
        assert (whole.mode, whole.size) == (load_image(FILES[name]).mode, load_image(FILES[name]).size)
        np.testing.assert_array_equal(to_uint8(whole, size), expected)


def test_errors_are_those_of_this_process(decoders, tmp_path):
    (tmp_path / "broken.png").write_bytes(FILES["PNG RGB"][:60])
    cases = [b"", b"<svg/>", FILES["JPEG RGB"][:-60], saved(Image.new("1", (3000, 3000)), "PNG"), many_scans(8, 101)]
    for content in [*cases, tmp_path / "broken.png"]:
        with pytest.raises(ImageError) as expected:
            load_image(content, max_pixels=4_200_000)
        with pytest.raises(ImageError) as error:
            decoders.image(content)
        assert (str(error.value), error.value.kind) == (str(expected.value), expected.value.kind)
    with pytest.raises(ImageError, match="too long and thin"):
        decoders.square(saved(Image.new("1", (1_000_000, 1)), "PNG"), 384)


def test_files_are_read_by_path(decoders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.png").write_bytes(FILES["PNG P"])
    assert decoders.image("here.png").mode == "P"
    with pytest.raises(FileNotFoundError, match=r"nothing\.png") as error:
        decoders.image("nothing.png")
    assert error.value.filename == "nothing.png"
    with pytest.raises(IsADirectoryError):
        decoders.image(tmp_path)
    os.mkfifo("pipe.png")
    with pytest.raises(OSError, match="not a file"):
        decoders.image("pipe.png")


@pytest.fixture(scope="module")
def strict():
    with Decoders(1, max_pixels=4_200_000, seconds=0.05) as pool:
        yield pool


@pytest.mark.parametrize("name", [*SLOW, "a BMP of single pixels"])
def test_what_takes_long_is_killed_and_the_next_image_is_decoded(strict, name):
    content = SLOW[name](2_000_000) if name in SLOW else bmp_runs(41_000, 102, b"\1\0\0\0" * 102)
    with pytest.raises(ImageError, match=r"takes more than 0\.05 s to decode") as error:
        strict.square(content, 32)
    assert error.value.kind == "image takes too long to decode"
    assert strict.square(FILES["PNG RGB"], 32).shape == (32, 32, 3)


def test_what_takes_much_memory_is_an_error():
    # Four hundred megabytes of comments, a byte each.
    with (
        Decoders(1, max_pixels=1_000_000, seconds=60.0) as pool,
        pytest.raises(ImageError, match="takes too much memory") as error,
    ):
        pool.square(SLOW["a GIF of comments"](12_000_000), 32)
    assert error.value.kind == "image too large"


def test_images_that_take_long_do_not_stand_in_the_way():
    with Decoders(1, seconds=LONG) as pool, concurrent.futures.ThreadPoolExecutor(3) as threads:
        slow = [threads.submit(pool.square, ENDLESS, 32) for _ in range(3)]
        for _ in range(3):
            assert pool.square(FILES["PNG RGB"], 32).shape == (32, 32, 3)
        assert not any(future.done() for future in slow)
        pool.close()
        for future in slow:
            with pytest.raises(DecoderError, match="closed"):
                future.result()
    assert pool.process_ids()
    assert not any(map(_is_there, pool.process_ids()))


def test_a_image_that_stepped_back_is_decoded_and_its_process_ends():
    large = bmp_runs(41_000, 102, b"\1\0\0\0" * 102)
    with Decoders(1, seconds=LONG) as pool, concurrent.futures.ThreadPoolExecutor(4) as threads:
        slow = [threads.submit(pool.square, large, 1) for _ in range(2)]
        until(lambda: pool._turns.is_wanted)
        assert pool.square(FILES["PNG RGB"], 32).shape == (32, 32, 3)
        assert [future.result().shape for future in slow] == [(1, 1, 3)] * 2
        pool.square(FILES["PNG RGB"], 32)
        assert {os.getpriority(os.PRIO_PROCESS, worker.pid) for worker in pool._idle} == {0}


def test_a_deadline_ends_the_image_at_hand_and_those_that_wait():
    with Decoders(1, seconds=LONG) as pool, concurrent.futures.ThreadPoolExecutor(4) as threads:
        pool.square(FILES["PNG RGB"], 32)
        late = [threads.submit(pool.square, ENDLESS, 32, time.monotonic() + 0.3) for _ in range(4)]
        for future in late:
            with pytest.raises(TimeoutError, match="not decoded in time"):
                future.result()
        assert pool.square(FILES["PNG RGB"], 32).shape == (32, 32, 3)
        assert len(pool.process_ids()) == 2  # none that went on


@pytest.mark.parametrize("wrong", [{"processes": 0}, {"waiting": 0}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_limits_are_above_zero(wrong):
    with pytest.raises(ValueError, match="are above 0"):
        Decoders(**wrong)


def test_only_so_many_wait():
    with Decoders(1, seconds=LONG, waiting=1) as pool, concurrent.futures.ThreadPoolExecutor(1) as threads:
        slow = threads.submit(pool.square, ENDLESS, 32)
        while len(pool.process_ids()) < 2:
            time.sleep(0.01)
        with pytest.raises(DecoderBusy):
            pool.square(FILES["PNG RGB"], 32)
        pool.close()
        with pytest.raises(DecoderError, match="closed"):
            slow.result()
        with pytest.raises(DecoderError, match="closed"):
            pool.square(FILES["PNG RGB"], 32)


def test_processes_that_die_are_replaced():
    with Decoders(1, seconds=LONG) as pool, concurrent.futures.ThreadPoolExecutor(1) as threads:
        expected = pool.square(FILES["PNG RGB"], 32)
        for which in (1, 0):  # one that decodes and is idle; the one that makes the others
            os.kill(pool.process_ids()[which], signal.SIGKILL)
            until(lambda: _state(pool.process_ids()[which]) in "ZX")  # noqa: B023
            np.testing.assert_array_equal(pool.square(FILES["PNG RGB"], 32), expected)
        slow = threads.submit(pool.square, ENDLESS, 32)
        until(lambda: _seconds(pool.process_ids()[1]) > 0.1)
        os.kill(pool.process_ids()[1], signal.SIGSEGV)
        with pytest.raises(ImageError, match=r"the decoder crashed on it \(status -11\)"):
            slow.result()
        np.testing.assert_array_equal(pool.square(FILES["PNG RGB"], 32), expected)


PARENT = """
import sys, threading
from magma_jax.data.decoders import Decoders
from tests.data.test_decoders import ENDLESS, FILES
pool = Decoders(2, seconds=2.0)
pool.square(FILES["PNG RGB"], 32)
threading.Thread(target=pool.square, args=(ENDLESS, 32), daemon=True).start()
while len(pool.process_ids()) < 2: pass
print(*pool.process_ids(), flush=True)
threading.Event().wait()
"""


def test_processes_end_with_their_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=_environment()) as parent:
        ids = [int(pid) for pid in parent.stdout.readline().split()]
        assert all(map(_is_there, ids))
        parent.kill()
    until(lambda: not any(_state(pid) not in "ZX" for pid in ids))


def test_the_processes_know_nothing_of_jax(decoders):
    decoders.square(FILES["PNG RGB"], 32)
    for pid in decoders.process_ids():
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert "_imaging" in loaded
        assert "jaxlib" not in loaded


def test_many_threads_get_their_own_images(decoders):
    images = [Image.new("RGB", (9, 9), (i, 255 - i, 7)) for i in range(0, 256, 8)]
    with Decoders(2) as pool, concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda image: pool.square(saved(image, "PNG"), 4), images)
        for image, pixels in zip(images, found, strict=True):
            assert pixels[2, 2].tolist() == list(image.getpixel((4, 4)))
        assert len(pool.process_ids()) <= 3


def test_turns_come_in_order():
    done, free = [], threading.Event()
    with Decoders(1) as pool, concurrent.futures.ThreadPoolExecutor(8) as threads:
        pool._turns.take(None)

        def decode(number):
            pool.square(FILES["PNG RGB"], 8)
            done.append(number)
            free.set()

        futures = []
        for number in range(6):
            futures.append(threads.submit(decode, number))
            until(lambda: len(pool._turns._waiting) == len(futures))
        pool._turns.give_back()
        concurrent.futures.wait(futures)
    assert done[0] == 0
    assert sorted(done) == list(range(6))


def test_warnings_of_pillow_are_not_written():
    code = (
        "import io, logging; logging.basicConfig()\n"
        "from tests.data.hostile_images import many_tags\n"
        "from magma_jax.data.images import load_image\n"
        "for _ in range(2): assert load_image(many_tags()).size == (8, 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def _is_there(pid: int) -> bool:
    return _state(pid) not in "ZX"


def _seconds(pid: int) -> float:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

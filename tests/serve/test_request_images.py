"""Images of requests: files below the folder, and those that take long beside other clients' requests."""

import concurrent.futures
import dataclasses
import os

import pytest

from magma_jax.data.images import ImageError
from magma_jax.serve import service
from magma_jax.serve.config import ServerConfig
from magma_jax.serve.prompts.images import ImageRules, decoders_of, read_image
from tests.data.hostile_images import saved
from tests.data.test_decoders import ENDLESS, until
from tests.serve.hostile import uri, with_url
from tests.serve.running import RULES, Running, square, user


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(saved(square("red"), "PNG"))
    images = tmp_path / "images"
    images.mkdir()
    (images / "red.png").write_bytes(saved(square("red"), "PNG"))
    (images / "large.png").write_bytes(bytes(2000))
    (images / "out.png").symlink_to(tmp_path / "secret.png")
    (images / "loop.png").symlink_to("again.png")
    (images / "again.png").symlink_to("loop.png")
    (images / "round").symlink_to(".")
    os.mkfifo(images / "pipe.png")
    return images


def test_files_below_the_folder_are_read(folder):
    rules = ImageRules(folder=folder, max_bytes=1000)
    for name in ("red.png", "round/round/red.png", "./red%2Epng"):
        assert read_image(f"file:///{name}", rules) == (folder / "red.png").read_bytes()
    with pytest.raises(ImageError, match="more than 1000 bytes"):
        read_image("file:///large.png", rules)


@pytest.mark.parametrize(
    "name",
    [
        *("nothing.png", "", "out.png", "../secret.png", "loop.png", "loop.png/x", "round", "pipe.png"),
        *("a" * 5000, "%00", "red.png/x", "[red.png", "//[red.png"),
    ],
)
def test_whatever_cannot_be_read_gets_the_same_words(folder, name):
    with pytest.raises(ImageError, match="no such image in the server's folder") as error:
        read_image(f"file:///{name}", ImageRules(folder=folder))
    assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_read_gets_the_same_words(folder, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refused)  # the superuser may read all
    with pytest.raises(ImageError, match="no such image in the server's folder"):
        read_image("file:///red.png", ImageRules(folder=folder))


def test_a_folder_that_is_a_loop_of_links_is_no_folder(folder):
    with pytest.raises(ImageError, match="no such image in the server's folder"):
        read_image("file:///red.png", ImageRules(folder=folder / "loop.png"))


def test_loops_and_pipes_are_client_errors_of_the_server(model, folder):
    running = Running(model, ServerConfig("tiny", images=dataclasses.replace(RULES, folder=folder)))
    try:
        for name in ("loop.png", "pipe.png", "nothing.png"):
            response = running.chat(**with_url(f"file:///{name}"))
            assert response.status_code == 400, name
        assert running.chat(**with_url("file:///red.png")).status_code == 200
    finally:
        running.stop()


@pytest.fixture
def made(monkeypatch):
    """The decoders of the servers that start."""
    found = []
    monkeypatch.setattr(service, "decoders_of", lambda *rules: found.append(decoders_of(*rules)) or found[-1])
    return found


def test_others_do_not_wait_for_images_that_take_long(model, made):
    rules = dataclasses.replace(RULES, max_pixels=64_000_000, seconds=2000.0)
    running = Running(model, ServerConfig("tiny", timeout=600.0, images=rules))
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        try:
            slow = [threads.submit(running.chat, **with_url(*[uri(ENDLESS)] * 3)) for _ in range(4)]
            while len(made[0].process_ids()) < 3:
                assert not any(future.done() for future in slow)
            for _ in range(2):
                assert running.chat(max_tokens=1).status_code == 200
                assert running.chat(messages=user(square("red"), "a"), max_tokens=1).status_code == 200
            assert not any(future.done() for future in slow)
        finally:
            made[0].close()
            # Whoever waits for an image is told.
            assert {future.result().status_code for future in slow} == {503}
            running.stop()


def test_a_request_past_its_time_stops_with_the_image_at_hand(model, made):
    rules = dataclasses.replace(RULES, max_pixels=64_000_000, seconds=2000.0)
    running = Running(model, ServerConfig("tiny", timeout=1.0, images=rules))
    try:
        response = running.chat(**with_url(*[uri(ENDLESS)] * 3))
        assert response.status_code == 504
        # Its process ends, and none takes up the next image: only the one is left that makes the others.
        until(lambda: len(made[0].process_ids()) == 1)
        # On a busy machine a new process may take longer to start than a request has.
        until(lambda: running.chat(messages=user(square("red"), "a"), max_tokens=1).status_code == 200)
        assert len(made[0].process_ids()) == 2
    finally:
        running.stop()

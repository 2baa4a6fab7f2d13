"""Processes that decode images and nothing else; ``data.decoders`` starts and watches them.

Run by its path, with its settings as JSON, so that nothing of the package is imported but ``pillow_steps``. The first
process is ready to decode and never does: for every socket that it is sent it makes a copy of itself that does, within
milliseconds, and it kills the copy whose number it is sent. It ends at the end of its input, and so do the copies.

On their sockets come requests and go answers: four bytes with the length of a JSON object, eight with the length of
what follows, the object, and that.
"""

import errno
import importlib.util
import io
import json
import os
import resource
import signal
import socket
import stat
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

LENGTHS = struct.Struct(">IQ")
# Of a process beside what the pixels take: the encoded image, several times over.
SPARE_MEMORY = 2**28


def main() -> None:
    """Makes processes and kills them, as it is told."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["path"]
    # The parent says when to end: schedulers send SIGTERM to all processes of a job, which may want to finish.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    steps = _load_steps()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What the C libraries have to say about damaged images is said in the answers too.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    control, children = socket.socket(fileno=0), set()
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 32, 1)
        if not message:
            return
        if sockets:
            answer = os.fork()
            if not answer:
                control.close()
                _serve(steps, sockets[0], settings)
            os.close(sockets[0])
            children.add(answer)
        else:
            # Numbers of processes are given again, but not before the process was waited for.
            answer, child = -signal.SIGKILL, int(message)
            if child in children:
                children.remove(child)
                os.kill(child, signal.SIGKILL)
                answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        control.sendall(b"%d" % answer)


def _serve(steps: ModuleType, connection: int, settings: dict[str, Any]) -> None:
    """Answers requests until there are none, and ends."""
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        steps.limit_memory(settings["max_pixels"], SPARE_MEMORY)
        steps.keep_freed_memory()
        requests, answers = open(connection, "rb"), open(connection, "wb", closefd=False)  # noqa: SIM115
        while (request := _receive(requests)) is not None:
            # The kernel kills this process when it has taken so much processor time, whatever library it is in.
            signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
            answer = _answer(steps, settings["max_pixels"], *request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(answers, *answer)
        os._exit(0)
    finally:
        os._exit(1)


def _load_steps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pillow_steps", Path(__file__).with_name("pillow_steps.py"))
    assert spec is not None and spec.loader is not None  # noqa: PT018  # a file beside this one
    steps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(steps)
    steps.Image.init()  # the plug-ins now: they would count as time of the first image
    return steps


def _answer(
    steps: ModuleType, max_pixels: int, request: dict[str, Any], content: bytes
) -> tuple[dict[str, Any], bytes]:
    """What an image becomes: a square of pixels where a size is wanted, or the whole image."""
    name = request["name"]
    try:
        try:
            with _opened(request["file"]) if "file" in request else io.BytesIO(content) as file:
                image = steps.decode(steps.open_image(file, name, max_pixels), name)
            if "size" in request:
                return {}, steps.to_square(image, request["size"]).tobytes()
            described = {"mode": image.mode, "size": image.size}
            if image.mode == "P":
                described["palette"] = image.getpalette("RGB")
            return described, image.tobytes()
        except MemoryError as error:
            raise steps.damaged(name, error) from None
    except steps.ImageError as error:
        return {"error": str(error), "kind": error.kind}, b""
    except OSError as error:  # of the file
        return {"errno": error.errno, "error": error.strerror or str(error)}, b""


def _opened(path: str) -> BinaryIO:
    # A pipe without a writer would be waited for.
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise OSError(errno.EINVAL, "not a file")
    return open(path, "rb")


def _receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head, body = LENGTHS.unpack(lengths)
    request = json.loads(stream.read(head))
    content = stream.read(body)
    return (request, content) if len(content) == body else None


def _send(stream: BinaryIO, head: dict[str, Any], body: bytes) -> None:
    encoded = json.dumps(head).encode()
    stream.write(LENGTHS.pack(len(encoded), len(body)) + encoded)
    stream.write(body)
    stream.flush()


if __name__ == "__main__":
    main()

"""Image decoding processes, started and supervised by ``data.decoders``.

The file is run as a script, with its settings as JSON, so that it imports only ``pillow_steps`` of the package. The
first process is a fork server: it forks a worker for every socket it receives, within milliseconds, and kills the
worker whose pid it receives. It ends at the end of its input, and so do the workers.

Requests and answers on the workers' sockets have one format: four bytes with the length of a JSON object, eight with
the length of the payload, the object, and the payload.
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
# Memory of a process in addition to the pixels: several copies of the encoded image.
SPARE_MEMORY = 2**28


def main() -> None:
    """Forks and kills workers on request."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["path"]
    # The parent decides when to end: schedulers send SIGTERM to all processes of a job.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    steps = _load_steps()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Silences the C libraries' messages about damaged images; the answers report the damage.
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
            # The system does not reuse a child's pid before it was waited for.
            answer, child = -signal.SIGKILL, int(message)
            if child in children:
                children.remove(child)
                os.kill(child, signal.SIGKILL)
                answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        control.sendall(b"%d" % answer)


def _serve(steps: ModuleType, connection: int, settings: dict[str, Any]) -> None:
    """Answers requests until the socket closes, then exits."""
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        steps.limit_memory(settings["max_pixels"], SPARE_MEMORY)
        steps.keep_freed_memory()
        requests, answers = open(connection, "rb"), open(connection, "wb", closefd=False)  # noqa: SIM115
        while (request := _receive(requests)) is not None:
            # The kernel kills this process after this CPU time, even inside a C library.
            signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
            answer = _answer(steps, settings["max_pixels"], *request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(answers, *answer)
        os._exit(0)
    finally:
        os._exit(1)


def _load_steps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pillow_steps", Path(__file__).with_name("pillow_steps.py"))
    assert spec is not None and spec.loader is not None  # noqa: PT018  # a file in this folder
    steps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(steps)
    steps.Image.init()  # loads the plug-ins before the first image is timed
    return steps


def _answer(
    steps: ModuleType, max_pixels: int, request: dict[str, Any], content: bytes
) -> tuple[dict[str, Any], bytes]:
    """Decodes an image: to a square if the request has a size, else to the whole image."""
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
    except OSError as error:  # from opening the file
        return {"errno": error.errno, "error": error.strerror or str(error)}, b""


def _opened(path: str) -> BinaryIO:
    # Opening a pipe without a writer would block.
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

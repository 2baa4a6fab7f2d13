"""A process that decodes pictures and nothing else; ``data.decoders`` starts and watches it.

Run by its path, with its settings as JSON, so that nothing of the package is imported but ``pillow_steps``. Requests
come on standard input, answers go to standard output: four bytes with the length of a JSON object, eight with the
length of what follows, the object, and that. Ends at the end of its input.
"""

import errno
import importlib.util
import io
import json
import os
import resource
import signal
import stat
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

LENGTHS = struct.Struct(">IQ")
# Beside other work of the machine. Much lower, and pictures would hardly be decoded while all cores are busy.
NICENESS = 5


def main() -> None:
    """Answers requests until there are none."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["path"]
    # The parent says when to end: schedulers send SIGTERM to all processes of a job, which may want to finish.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    steps = _load_steps()
    _limit_memory(settings["memory"])
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _send(answers, {}, b"")
    # What the C libraries have to say about damaged pictures is said in the answer too.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    while (request := _receive(requests)) is not None:
        # The kernel kills this process when it has taken so much processor time, whatever library it is in.
        signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
        answer = _answer(steps, *request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(answers, *answer)


def _load_steps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pillow_steps", Path(__file__).with_name("pillow_steps.py"))
    steps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(steps)
    steps.Image.preinit()  # the plug-ins now: they would count as time of the first picture
    importlib.import_module("PIL.WebPImagePlugin")
    return steps


def _limit_memory(size: int) -> None:
    """Lets this process have so many bytes more, write no file and leave no dump."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        size += int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _answer(steps: ModuleType, request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    """What a picture becomes: a square of pixels where a size is wanted, or the whole picture."""
    name = request["name"]
    try:
        try:
            with _opened(request["file"]) if "file" in request else io.BytesIO(content) as file:
                image = steps.decode(steps.open_picture(file, name, request["max_pixels"]), name)
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

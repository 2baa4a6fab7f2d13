"""One writer of a run folder at a time, also where several machines share the disk.

The lock is a file in the folder that names its holder: host, process, since when. It is made under another name and
linked to its own, which on every shared file system either happens whole or not at all. ``flock`` is not used: on many
of them it is missing, or knows the processes of one machine only.

The lock of a holder that is gone is replaced by renaming a new one over it, so that at no time the folder looks free.
Who may do that is settled by a second lock of the same make, whose name comes from what the first one says.

Whether a holder lives is known at once where its process would be seen: on the same machine, since the same start. The
process must also have begun when the holder did, for numbers of processes come again. Everywhere else the file itself
is watched: its holder writes a count into it every ``BEAT_S`` seconds. A count that stands still for ``WATCH_S``, which
is longer than file systems keep what they have read, belongs to a process that is gone. No two clocks are compared.
"""

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magma_jax.foreign import ForeignError, parse_json, read_text, shown
from magma_jax.runtime.distributed import log_main
from magma_jax.storage.checksums import CheckpointError

LOCK_FILE = ".writer.lock"
BEAT_S = 15.0
WATCH_S = 90.0
_POLL_S = 1.0


class RunLock:
    """The right to write a run folder, from the time it is made until ``release``.

    Raises:
        CheckpointError: another process has it.
    """

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / LOCK_FILE
        self._token = secrets.token_hex(8)
        self._line = f"{json.dumps(_myself() | {'token': self._token})}\n".encode()
        self._beats, self._ended = 0, threading.Event()
        self._descriptor = self._take(self._path)
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._thread.start()

    def lost_to(self) -> str | None:
        """Who has taken the folder over, which happens to a process that was suspended; None while it is ours."""
        content = _read(self._path)
        if content is None or _holder(content).get("token") == self._token:
            return None
        return _name(_holder(content))

    def release(self) -> None:
        """Gives the folder free; may be called twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if self.lost_to() is None:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _take(self, path: Path) -> int:
        """The open file at the path, which is ours from here on, in the place of a holder that is gone if need be."""
        while (descriptor := self._place(path)) is None:
            content = _read(path)
            if content is not None and (descriptor := self._replace(path, content)) is not None:
                break
        return descriptor

    def _place(self, path: Path) -> int | None:
        """The open file, new at the path; None if there is one already."""
        temporary, descriptor = self._write()
        try:
            os.link(temporary, path)
            return descriptor
        except FileExistsError:
            # Over a network an answer may get lost, and the second try finds the link of the first.
            if os.fstat(descriptor).st_nlink == 2:
                return descriptor
        except OSError:  # a disk without hard links
            with contextlib.suppress(FileExistsError):
                return _write_new(path, self._content())
        finally:
            temporary.unlink(missing_ok=True)
        os.close(descriptor)
        return None

    def _replace(self, path: Path, content: str) -> int | None:
        """The open file, in the place of the one with this content; None if that one changed meanwhile.

        Raises:
            CheckpointError: its holder lives.
        """
        holder = _holder(content)
        lives = _lives(holder)
        if lives is None:
            log_main(f"{self._folder}: held by {_name(holder)}; waiting up to {WATCH_S:.0f} s for a sign of life")
            lives = self._moves(path, content)
        if lives:
            raise CheckpointError(_refusal(self._folder, holder))
        right = path.with_name(f"{path.name}.{hashlib.sha256(content.encode()).hexdigest()[:16]}")
        right_descriptor = self._take(right)
        try:
            if _read(path) != content:
                return None
            temporary, descriptor = self._write()
            os.replace(temporary, path)
            log_main(f"{self._folder}: taken over from {_name(holder)}, which is gone")
            return descriptor
        finally:
            os.close(right_descriptor)
            right.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return self._line + f"{0:010d}\n".encode()

    def _write(self) -> tuple[Path, int]:
        """A file of ours under a name that nobody looks for, and its descriptor."""
        temporary = self._path.with_name(f"{LOCK_FILE}.{self._token}")
        return temporary, _write_new(temporary, self._content())

    def _moves(self, path: Path, content: str) -> bool:
        """Whether the file changes while it is watched."""
        end = time.monotonic() + WATCH_S
        while time.monotonic() < end:
            time.sleep(_POLL_S)
            now = _read(path)
            if now is None:  # given free
                return False
            if now != content:
                return True
        return False

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_S):
            # Whatever ails the disk: without a beat others may take over, and that is noticed before saving.
            with contextlib.suppress(OSError):
                if not self._path.exists() and (descriptor := self._place(self._path)) is not None:
                    os.dup2(descriptor, self._descriptor, inheritable=False)
                    os.close(descriptor)
                elif self.lost_to() is not None:
                    return
                self._beats += 1
                os.pwrite(self._descriptor, f"{self._beats:010d}\n".encode(), len(self._line))
                os.fsync(self._descriptor)


def writer_of(folder: Path) -> str | None:
    """Why the folder may not be written, if a process that can be seen from here writes it; takes nothing."""
    holder = _holder(_read(folder / LOCK_FILE) or "")
    return _refusal(folder, holder) if _lives(holder) else None


def _refusal(folder: Path, holder: Mapping[str, Any]) -> str:
    return f"{folder}: {_name(holder)} is writing this run; wait for it, or end it to continue here"


def _write_new(path: Path, content: bytes) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def _read(path: Path) -> str | None:
    """What the file says, nothing if it is no text; None if there is none."""
    try:
        return read_text(path, 10_000)
    except FileNotFoundError:
        return None
    except (OSError, ForeignError):
        return ""


def _holder(content: str) -> Mapping[str, Any]:
    """What the file tells of its holder; nothing if it is none of ours."""
    with contextlib.suppress(ForeignError):
        if isinstance(holder := parse_json(content.partition("\n")[0]), Mapping):
            return holder
    return {}


def _name(holder: Mapping[str, Any]) -> str:
    who = f"process {shown(holder.get('process', '?'))} on {shown(holder.get('host', '?'))}"
    return f"{who} (since {shown(holder.get('since', '?'))})"


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "born": _born(os.getpid()),
    }


def _lives(holder: Mapping[str, Any]) -> bool | None:
    """Whether the holder's process is there; None where it could not be seen."""
    machine, process = holder.get("machine"), holder.get("process")
    if machine is None or machine != _machine() or not isinstance(process, int):
        return None
    return _born(process) == holder.get("born")


def _machine() -> str | None:
    """This machine since it was started, and the part of its processes that is visible here; None if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(process: int) -> str | None:
    """When a process began, in the machine's own count; None if it is not there or has ended."""
    try:
        state, *others = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else others[18]

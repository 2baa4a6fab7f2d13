"""Lock of a run folder: one writer at a time, even if several machines share the disk.

The lock is a file in the folder that names its holder: host, process and start time. It is created under a temporary
name and hard-linked to its final one, which is atomic on every shared file system. ``flock`` is not used: many of these
lack it, or apply it to the processes of one machine only.

A stale lock is replaced by renaming a new one over it, so that the folder never looks free. A second lock of the same
kind, named after the content of the first, decides which process may do so.

On the holder's own machine, since the same boot, its process can be looked up; its start time must also match, because
process ids are reused. Elsewhere the file is watched: the holder writes a counter into it every ``BEAT_S`` seconds. If
the counter does not change for ``WATCH_S``, which exceeds the cache times of file systems, the holder is gone. Clocks
of different machines are never compared.
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
POLL_S = 1.0


class RunLock:
    """The exclusive right to write a run folder, from construction until ``release``.

    Raises:
        CheckpointError: another process holds it.
    """

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / LOCK_FILE
        self._token = secrets.token_hex(8)
        self._line = f"{json.dumps(myself() | {'token': self._token})}\n".encode()
        self._beats, self._ended = 0, threading.Event()
        self._descriptor = self._take(self._path)
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._thread.start()

    def lost_to(self) -> str | None:
        """The process that has taken over the folder, possible after a suspension; None while the lock is ours."""
        content = _read(self._path)
        if content is None or holder_of(content).get("token") == self._token:
            return None
        return name_of(holder_of(content))

    def release(self) -> None:
        """Releases the folder; may be called twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if self.lost_to() is None:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _take(self, path: Path) -> int:
        """Takes the lock at the path, replacing a stale one if necessary; returns its open file."""
        while (descriptor := self._place(path)) is None:
            content = _read(path)
            if content is not None and (descriptor := self._replace(path, content)) is not None:
                break
        return descriptor

    def _place(self, path: Path) -> int | None:
        """Creates the lock at the path and returns its open file; None if one exists."""
        temporary, descriptor = self._write()
        try:
            os.link(temporary, path)
            return descriptor
        except FileExistsError:
            # On network file systems a reply may get lost, and the retry then finds the first link.
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
        """Replaces the lock that has this content and returns the open file; None if the lock has changed meanwhile.

        Raises:
            CheckpointError: its holder is alive.
        """
        holder = holder_of(content)
        alive = lives(holder)
        if alive is None:
            log_main(f"{self._folder}: held by {name_of(holder)}; waiting up to {WATCH_S:.0f} s for a sign of life")
            alive = self._moves(path, content)
        if alive:
            raise CheckpointError(refusal(self._folder, holder))
        right = path.with_name(f"{path.name}.{hashlib.sha256(content.encode()).hexdigest()[:16]}")
        right_descriptor = self._take(right)
        try:
            if _read(path) != content:
                return None
            temporary, descriptor = self._write()
            os.replace(temporary, path)
            log_main(f"{self._folder}: taken over from {name_of(holder)}, which is gone")
            return descriptor
        finally:
            os.close(right_descriptor)
            right.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return self._line + f"{0:010d}\n".encode()

    def _write(self) -> tuple[Path, int]:
        """Writes our lock under a temporary name; returns its path and descriptor."""
        temporary = self._path.with_name(f"{LOCK_FILE}.{self._token}")
        return temporary, _write_new(temporary, self._content())

    def _moves(self, path: Path, content: str) -> bool:
        """Whether the file changes within ``WATCH_S``."""
        end = time.monotonic() + WATCH_S
        while time.monotonic() < end:
            time.sleep(POLL_S)
            now = _read(path)
            if now is None:  # released
                return False
            if now != content:
                return True
        return False

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_S):
            # Disk errors are ignored: without a heartbeat others may take over, which is noticed before saving.
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
    """The reason why the folder may not be written, if a process visible from here holds it; does not take the lock."""
    holder = holder_of(_read(folder / LOCK_FILE) or "")
    return refusal(folder, holder) if lives(holder) else None


def refusal(folder: str | Path, holder: Mapping[str, Any]) -> str:
    """The line for a folder that its living holder has locked."""
    return f"{folder}: {name_of(holder)} is writing this run; wait for it, or end it to continue here"


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
    """Content of the file, empty if it is not text; None if there is no file."""
    try:
        return read_text(path, 10_000)
    except FileNotFoundError:
        return None
    except (OSError, ForeignError):
        return ""


def holder_of(content: str) -> Mapping[str, Any]:
    """The holder that the lock file names; empty if it is not a lock file."""
    with contextlib.suppress(ForeignError):
        if isinstance(holder := parse_json(content.partition("\n")[0]), Mapping):
            return holder
    return {}


def name_of(holder: Mapping[str, Any]) -> str:
    """Process, host and start time of a holder, in words."""
    who = f"process {shown(holder.get('process', '?'))} on {shown(holder.get('host', '?'))}"
    return f"{who} (since {shown(holder.get('since', '?'))})"


def myself() -> dict[str, Any]:
    """This process as a holder."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "born": _born(os.getpid()),
    }


def lives(holder: Mapping[str, Any]) -> bool | None:
    """Whether the holder's process is running; None if that cannot be seen from here."""
    machine, process = holder.get("machine"), holder.get("process")
    if machine is None or machine != _machine() or not isinstance(process, int):
        return None
    return _born(process) == holder.get("born")


def _machine() -> str | None:
    """Boot id and PID namespace of this machine; None if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(process: int) -> str | None:
    """Start time of a process in the kernel's clock ticks; None if it does not exist or has ended."""
    try:
        state, *others = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else others[18]

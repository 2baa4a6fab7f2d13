"""Lock of a run folder in object storage, as ``run_lock`` is for disks: one object that names its holder.

An object is created only if there is none, of several processes by one. A stale lock is overwritten by the process that
creates a second object, named after the content of the first. A process that is suspended for minutes while it takes
over may find another one in the folder; it notices before it saves.
"""

import contextlib
import hashlib
import json
import secrets
import threading
import time

from magma_jax.runtime.distributed import log_main
from magma_jax.storage.checksums import CheckpointError
from magma_jax.storage.objects.store import Store, StoreError
from magma_jax.training.checkpoints import run_lock
from magma_jax.training.checkpoints.run_lock import LOCK_FILE, holder_of, lives, myself, name_of, refusal


class BucketLock:
    """The exclusive right to write a run folder in a bucket, from construction until ``release``.

    Raises:
        CheckpointError: another process holds it. StoreError: the bucket cannot be written.
    """

    def __init__(self, store: Store):
        self._store = store
        self._token = secrets.token_hex(8)
        self._line = f"{json.dumps(myself() | {'token': self._token})}\n"
        self._beats, self._ended = 0, threading.Event()
        while not self._store.create(LOCK_FILE, self._content()):
            if (found := self._store.read(LOCK_FILE)) is not None and self._replace(found):
                break
        self._thread = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self._thread.start()

    def lost_to(self) -> str | None:
        """The process that has taken over the folder; None while the lock is ours."""
        holder = holder_of(_text(self._store.read(LOCK_FILE)))
        return name_of(holder) if holder.get("token", self._token) != self._token else None

    def release(self) -> None:
        """Releases the folder; may be called twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        # A lock that cannot be removed now counts as stale later.
        with contextlib.suppress(StoreError):
            if self.lost_to() is None:
                self._store.remove([LOCK_FILE])

    close = release

    def _content(self) -> bytes:
        return f"{self._line}{self._beats:010d}\n".encode()

    def _replace(self, found: bytes) -> bool:
        """Replaces the lock that has this content; returns false if it has changed meanwhile."""
        holder = holder_of(_text(found))
        alive = lives(holder)
        if alive is None:
            log_main(
                f"{self._store.address}: held by {name_of(holder)}; waiting up to {run_lock.WATCH_S:.0f} s for a sign "
                "of life"
            )
            alive = self._moves(found)
        if alive:
            raise CheckpointError(refusal(self._store.address, holder))
        right = f"{LOCK_FILE}.{hashlib.sha256(found).hexdigest()[:16]}"
        if not self._store.create(right, self._content()):
            # Another process is replacing the lock, or was killed when it did.
            if not self._moves(found):
                self._store.remove([right])
            return False
        try:
            if self._store.read(LOCK_FILE) != found:
                return False
            self._store.write(LOCK_FILE, self._content())
        finally:
            self._store.remove([right])
        log_main(f"{self._store.address}: taken over from {name_of(holder)}, which is gone")
        return True

    def _moves(self, found: bytes) -> bool:
        """Whether the lock is rewritten within ``WATCH_S``; false if it is released."""
        end = time.monotonic() + run_lock.WATCH_S
        while time.monotonic() < end:
            time.sleep(run_lock.POLL_S)
            now = self._store.read(LOCK_FILE)
            if now != found:
                return now is not None
        return False

    def _keep_beating(self) -> None:
        while not self._ended.wait(run_lock.BEAT_S):
            # Without a heartbeat others may take over, which is noticed before saving.
            with contextlib.suppress(StoreError):
                if self.lost_to() is not None:
                    return
                self._beats += 1
                self._store.write(LOCK_FILE, self._content())


def bucket_writer(store: Store) -> str | None:
    """As ``run_lock.writer_of``."""
    holder = holder_of(_text(store.read(LOCK_FILE)))
    return refusal(store.address, holder) if lives(holder) else None


def _text(content: bytes | None) -> str:
    return (content or b"").decode(errors="replace")

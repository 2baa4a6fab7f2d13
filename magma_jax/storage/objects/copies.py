"""Local copies of folders in object storage.

Files are read from a copy: a cache, in which only what has changed is fetched again. What a command or a run writes
goes to a local folder first, and from there to the bucket; an object appears whole or not at all, and ``model.json``,
without which no folder is a model folder, comes last.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from magma_jax.foreign import ForeignError, read_json
from magma_jax.output import OutputError, check_room, object_address, replace_file, size_text
from magma_jax.runtime.ending import give_back_at_end
from magma_jax.storage.checksums import SUMS_FILE
from magma_jax.storage.objects.store import Entry, Store, StoreError

# What makes a folder a model folder, ``storage.model_folder.MODEL_FILE``.
LAST_FILE = "model.json"
# What only a person looks at, and the lock; no reader of a run needs them.
_NOT_READ = re.compile(r"(tensorboard|wandb|nonfinite)/|\.")
_OPTIMIZER = re.compile(r"checkpoints/\d+/optimizer/")
_STEP = re.compile(r"checkpoints/[^/]*/")
_NO_FILE = re.compile(r"checkpoints/|\.")
# Is there while a new run folder is uploaded.
_UNFINISHED = ".unfinished"
# Seconds between uploads of a run's small files. A bucket takes one change of an object a second.
UPLOAD_EVERY_S = 60.0


def local_copy(path: str | Path, *, optimizer: bool = False) -> Path:
    """A local path to read from: an address is fetched to a cache, a path is returned unchanged.

    The cache is ``magma_jax/objects`` in ``XDG_CACHE_HOME`` (``~/.cache``). Unfinished checkpoints of a run stay in the
    bucket, and so do the optimizer's states unless ``optimizer`` is set.

    Raises:
        StoreError: there is nothing at the address, or the bucket cannot be read. OutputError: the disk is full.
    """
    address = object_address(path)
    if address is None:
        return Path(path)
    store = Store(address)
    folder = _cache() / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    local = folder / Path(address).name
    with _waiting_lock(folder / "lock"):
        entries = store.entries()
        steps = {name[: -len(SUMS_FILE)] for name in entries if name.endswith(f"/{SUMS_FILE}")}
        entries = {
            name: entry
            for name, entry in entries.items()
            if not _NOT_READ.match(name)
            and (optimizer or not _OPTIMIZER.match(name))
            and ((step := _STEP.match(name)) is None or step[0] in steps)
        }
        if not entries:
            raise StoreError(f"{address}: holds nothing; check the address")
        _fetch(store, entries, local, folder / "fetched.json")
    return local


@contextlib.contextmanager
def uploading(path: str | Path) -> Iterator[Path]:
    """A local folder whose new and changed files are uploaded when the block ends; a local path is yielded unchanged.

    Raises:
        StoreError: as ``local_copy``; a folder that does not exist yet is an empty one.
    """
    address = object_address(path)
    if address is None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="magma_jax-") as temporary:
        copy = WorkingCopy(address, temporary)
        if copy.store.entries():
            shutil.copytree(local_copy(address), copy.folder, copy_function=_link_or_copy, dirs_exist_ok=True)
            copy.take_as_uploaded()
        yield copy.folder
        copy.upload()


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """As ``uploading``, for output at which nothing may exist yet.

    Raises:
        OutputError: there is something at the address.
    """
    address = object_address(path)
    if address is not None and Store(address).entries():
        raise OutputError(f"{address}: already exists; choose another name or remove it first")
    with uploading(path) as folder:
        if address is not None:
            folder.rmdir()
        yield folder


class WorkingCopy:
    """A local folder beside an address, to which its files are uploaded as they change.

    Args:
        address: the folder in the bucket.
        parent: folder in which the local one, of the same name, is made.

    Attributes:
        store: the objects at the address.
        folder: the local folder.
    """

    def __init__(self, address: str, parent: str | Path):
        self.store = Store(address)
        self.address = self.store.address
        self.folder = Path(parent) / Path(self.address).name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def remove_at_exit(self) -> None:
        """Removes the parent folder when this object is no longer used, or the process ends."""
        give_back_at_end(self, shutil.rmtree, self.folder.parent, ignore_errors=True)

    def fetch(self) -> None:
        """Fetches the files of a run that are not here, but for checkpoints and the lock; nothing if there is no run.

        Raises:
            OutputError: there is something else.
        """
        # Processes of one machine share the folder.
        with _waiting_lock(self.folder.parent / "lock"):
            entries = self.store.entries()
            if self._is_new(entries):
                return
            entries = {name: entry for name, entry in entries.items() if not _NO_FILE.match(name)}
            absent = {name: self.folder / name for name in entries if not (self.folder / name).exists()}
            check_room(self.folder, sum(entries[name].size for name in absent))
            self.store.download(absent)
        self.take_as_uploaded()

    def begin(self) -> None:
        """Uploads a new folder, in place of what a killed process has left of its first upload.

        Raises:
            OutputError: there is a run, or something else.
        """
        entries = self.store.entries()
        if not self._is_new(entries):
            raise OutputError(f"{self.address}: another process has begun a run here; start again to continue it")
        self.store.write(_UNFINISHED, b"")
        self.store.remove([name for name in entries if not name.startswith(".")])
        self.upload()
        self.store.remove([_UNFINISHED])

    def _is_new(self, entries: Collection[str]) -> bool:
        if LAST_FILE in entries:
            return False
        if _UNFINISHED not in entries and not all(name.startswith(".") for name in entries):
            raise OutputError(f"{self.address}: holds files, but no run; choose another name or remove them first")
        return True

    def take_as_uploaded(self) -> None:
        """Says that the bucket holds every file as it is here."""
        self._uploaded = self._files()

    def upload(self) -> None:
        """Uploads files that are new or have changed; ``model.json`` last."""
        with self._lock:
            files = self._files()
            changed = {name: mark for name, mark in files.items() if self._uploaded.get(name) != mark}
            last = {name for name in changed if name == LAST_FILE}
            for names in (changed.keys() - last, last):
                self.store.upload({name: self.folder / name for name in names})
                self._uploaded |= {name: changed[name] for name in names}

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file; those being written have names that begin with a dot."""
        files = {}
        for path in [self.folder] if self.folder.is_file() else self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            if any(part.startswith(".") and part != ".zarray" for part in name.parts):
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    about = path.stat()
                    files["" if path == self.folder else name.as_posix()] = about.st_size, about.st_mtime_ns
        return files


class Uploads:
    """Uploads a working copy now and then in the background, and once more when the block ends.

    A failure in between is left to the next time.
    """

    def __init__(self, copy: WorkingCopy | None):
        self._copy, self._ended = copy, threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def __enter__(self) -> "Uploads":
        if self._copy is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._copy is None:
            return
        self._ended.set()
        self._thread.join()
        try:
            self._copy.upload()
        except (StoreError, OSError):
            if kind is None:  # otherwise the first error is the one to report
                raise

    def _work(self) -> None:
        assert self._copy is not None
        while not self._ended.wait(UPLOAD_EVERY_S):
            with contextlib.suppress(StoreError, OSError):
                self._copy.upload()


def _fetch(store: Store, entries: dict[str, Entry], local: Path, record: Path) -> None:
    """Makes ``local`` a copy of ``entries``; ``record`` holds the tags of what is there already."""
    try:
        known = read_json(record)
    except (OSError, ForeignError):
        known = {}
    if local.is_dir():
        for file in list(local.rglob("*")):
            if file.is_file() and file.relative_to(local).as_posix() not in entries:
                file.unlink()
    files = {name: local / name if name else local for name in entries}
    absent = [name for name, entry in entries.items() if known.get(name) != entry.tag or not files[name].is_file()]
    nbytes = sum(entries[name].size for name in absent)
    check_room(record.parent, nbytes)
    if nbytes >= 10**8:
        print(f"fetching {store.address} ({size_text(nbytes)})", file=sys.stderr)
    # A file that is being fetched counts as absent if this process is killed.
    there = {name: entry.tag for name, entry in entries.items() if name not in absent}
    replace_file(record, json.dumps(there).encode())
    store.download({name: files[name] for name in absent})
    replace_file(record, json.dumps({name: entry.tag for name, entry in entries.items()}).encode())


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magma_jax" / "objects"


@contextlib.contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _link_or_copy(source: str, target: str) -> None:
    """Copies a file; one that is never changed in place, as arrays are, is linked where the disk allows it."""
    if re.search(r"/(params|checkpoints)/|\.safetensors$", source):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)

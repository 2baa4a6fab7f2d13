"""Objects below an address such as ``gs://bucket/runs/a``: listing, reading and writing them.

A bucket has neither folders nor renames: names hold slashes, and an object appears whole or not at all. Requests that
fail for a passing reason are repeated with growing pauses by the client library, for half a minute.
"""

import contextlib
import functools
import hashlib
import importlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from magma_jax.output import object_address, raise_if_full

_THREADS = 16
_BLOCK_NBYTES = 8 * 2**20
_LOGIN = {
    "gs": "log in with `gcloud auth application-default login`, or give the machine a service account with the role "
    "Storage Object User on the bucket",
    "s3": "set AWS_PROFILE, or give the machine a role with s3:ListBucket, GetObject, PutObject and DeleteObject",
}


class StoreError(ValueError):
    """Failed access to object storage; one line with the address, the reason and the remedy."""


class Entry(NamedTuple):
    """An object: its size in bytes, and a tag that changes with its content."""

    size: int
    tag: str


class Store:
    """The objects below one address; names are relative to it. The object at the address itself has the name "".

    Raises:
        StoreError: no client library, and from every method: no such bucket, no permission, or no answer.
    """

    def __init__(self, address: str):
        self.address = object_address(address) or address
        scheme, _, self._root = self.address.partition("://")
        self.bucket = self._root.partition("/")[0]
        if not self.bucket:
            raise StoreError(f"{address}: names no bucket; write {scheme}://BUCKET/FOLDER")
        self._files, self._login = _files(scheme), _LOGIN[scheme]

    def check(self) -> None:
        """Raises StoreError if the bucket does not exist or may not be listed."""
        with self._explained():
            try:
                if "gs" in self._files.protocol:
                    self._files.call("GET", "b/{}/o", self.bucket, maxResults=1, json_out=True)
                else:
                    self._files.call_s3("list_objects_v2", Bucket=self.bucket, MaxKeys=1)
            except FileNotFoundError:
                raise StoreError(
                    f"{self.address}: there is no bucket {self.bucket}; check the name, or create it"
                ) from None

    def entries(self, below: str = "") -> dict[str, Entry]:
        """All objects below ``below`` by name."""
        self.check()
        root = self._place(below)
        with self._explained():
            found = self._files.find(root, detail=True)
        entries = {}
        for place, about in found.items():
            name = place.removeprefix(self._root).removeprefix("/")
            if place.endswith("/"):  # a folder that the console or a mount has made
                continue
            if ".." in name.split("/") or "\0" in name:
                raise StoreError(f"{self.address}: holds an object named {name!r:.100}; do not trust it")
            entries[name] = Entry(about["size"], str(about.get("generation") or about["ETag"]))
        return entries

    def read(self, name: str) -> bytes | None:
        """Content of an object; None if there is none."""
        with self._explained():
            try:
                return self._files.cat_file(self._place(name))
            except FileNotFoundError:
                self.check()
                return None

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, or replaces it."""
        with self._explained():
            self._files.pipe_file(self._place(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object that does not exist yet; returns false if it does. Of several callers one succeeds."""
        with self._explained():
            try:
                self._files.pipe_file(self._place(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def remove(self, names: Collection[str]) -> None:
        """Removes objects; those that do not exist are ignored."""

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._place(name))

        self._each(remove, names)

    def download(self, files: Mapping[str, Path]) -> None:
        """Copies objects to files; their folders are created."""

        def download(name: str) -> None:
            file = files[name]
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._files.get_file(self._place(name), str(file))
            except OSError as error:
                raise_if_full(file, error)
                raise

        self._each(download, files)

    def upload(self, files: Mapping[str, Path]) -> None:
        """Copies files to objects."""
        self._each(lambda name: self._files.put_file(str(files[name]), self._place(name)), files)

    def sha256(self, names: Collection[str]) -> dict[str, str]:
        """Hex digests of objects, which are read whole."""
        digests: dict[str, str] = {}

        def digest(name: str) -> None:
            with self._files.open(self._place(name), "rb", block_size=_BLOCK_NBYTES) as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()

        self._each(digest, names)
        return digests

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _each(self, work: Callable[[str], None], names: Collection[str]) -> None:
        with self._explained(), ThreadPoolExecutor(_THREADS, thread_name_prefix="objects") as pool:
            waiting = [pool.submit(work, name) for name in names]
            try:
                for one in waiting:
                    one.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _failed(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self.address}: the bucket fails, after several attempts ({_reason(error)}); check the network and run "
            "the command again"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the errors of the client library into lines; those of local files pass."""
        try:
            yield
        except ValueError as error:
            if type(error).__module__.startswith("magma_jax"):
                raise
            raise StoreError(f"{self.address}: {_reason(error)}") from error
        except FileNotFoundError as error:
            if error.filename is not None:
                raise
            self.check()
            raise StoreError(f"{self.address}: {error} is not there; another program may be removing it") from error
        except OSError as error:
            if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
                raise StoreError(f"{self.address}: no permission ({_reason(error)}); {self._login}") from error
            if error.errno is not None and error.filename is not None:
                raise
            raise self._failed(error) from error
        except Exception as error:
            if getattr(error, "code", None) in (401, "401") or type(error).__name__ == "NoCredentialsError":
                raise StoreError(f"{self.address}: not logged in ({_reason(error)}); {self._login}") from error
            raise self._failed(error) from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{(lines or [type(error).__name__])[-1]:.200}"


@functools.cache
def _files(scheme: str) -> Any:
    """fsspec's file system of a scheme.

    Raises:
        StoreError: its package is missing.
    """
    package, extra = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}[scheme]
    try:
        # The class that gcsfs itself registers asks by gRPC what kind of bucket it is; here every kind is used alike.
        kind = getattr(
            importlib.import_module(f"{package}.core"), "GCSFileSystem" if scheme == "gs" else "S3FileSystem"
        )
    except ModuleNotFoundError as error:
        raise StoreError(
            f"{scheme}:// addresses need another package: pip install {package} (the extra {extra}; {error.name} is "
            "missing)"
        ) from None
    import fsspec
    from fsspec.config import conf

    # Orbax's own instance is to be of the same kind, and neither may remember listings: TensorStore writes objects that
    # fsspec does not see.
    for name in [kind.protocol] if isinstance(kind.protocol, str) else kind.protocol:
        fsspec.register_implementation(name, kind, clobber=True)
        conf.setdefault(name, {})["use_listings_cache"] = False
    # Failures are reported in one line.
    for name in (package, "aiobotocore", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return fsspec.filesystem(scheme)

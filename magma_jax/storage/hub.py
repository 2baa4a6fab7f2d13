"""Files of the Hugging Face hub, by names such as ``hf://EleutherAI/gpt-j-6b@float16/pytorch_model.bin``.

    hf://OWNER/NAME[@REVISION][/FILE]      FILE may be left out where the repository holds one set of weights

Downloads land in the hub's own cache (``HF_HOME``, ``HF_HUB_CACHE``), which other programs share. ``huggingface_hub``
knows the protocol, but throws away what an interrupted program had fetched, and compares sizes only. Here a partial
file is kept and continued, also by a later process, and a file enters the cache when its hash is the one that the
server promised. ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and the proxy settings are honoured.
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import (
    HfApi,
    HfFileMetadata,
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    parse_hf_uri,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from magma_jax.foreign import read_json

SCHEME = "hf://"

# Names that libraries give to weights, in the order in which they are preferred where a repository has several. That
# of open_clip is first: its repositories may hold the same model once more in names that are not read here.
WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"),
    "mp_rank_00_model_states.pt",
)
# Small files that tell what weights do not; fetched beside them where they exist.
SETTINGS = ("config.json", "tokenizer.json", "open_clip_config.json")

_READ_NBYTES = 2**24


class HubError(ValueError):
    """A download that did not work: what was asked for, why not, and what to do, in one line."""


def local_path(source: str | Path) -> Path:
    """The file or folder that a source names: downloaded if it is an ``hf://`` address, else the path itself.

    Raises:
        HubError: the address is malformed, the file does not exist, cannot be fetched, or does not arrive whole.
    """
    source = str(source)
    return fetch(source) if source.startswith(SCHEME) else Path(source)


def fetch(address: str) -> Path:
    """Downloads a file, or the weights of a repository with the settings beside them, unless the cache has them.

    Returns:
        The file in the cache; for weights in several files their index, whose folder holds all of them.

    Raises:
        HubError: see ``local_path``.
    """
    try:
        uri = parse_hf_uri(address)
    except ValueError as error:
        raise HubError(
            f"{address}: not a hub address ({_one_line(error)}); write hf://OWNER/NAME[@REVISION][/FILE]"
        ) from None
    if uri.type != "model":
        raise HubError(f"{address}: is a {uri.type}; only models hold weights")
    revision = uri.revision or constants.DEFAULT_REVISION
    if uri.path_in_repo:
        return _fetch_file(uri.id, revision, uri.path_in_repo)
    names = _list(uri.id, revision)
    weights = _choose(_address(uri.id, revision), names)
    for name in SETTINGS:
        if name in names:
            _fetch_file(uri.id, revision, name)
    path = _fetch_file(uri.id, revision, weights)
    if weights.endswith(".index.json"):
        for shard in _shards(path, names):
            _fetch_file(uri.id, revision, shard)
    return path


def _choose(where: str, names: Collection[str]) -> str:
    """The one file to read of those in a repository."""
    for name in WEIGHTS:
        if name in names:
            return name
    others = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    if len(others) != 1:
        found = f"several ({', '.join(sorted(others)[:8])})" if others else f"none among {', '.join(sorted(names)[:8])}"
        raise HubError(f"{where}: which file holds the weights? There are {found}; add /FILE to the address")
    return others[0]


def _shards(index: Path, names: Collection[str]) -> list[str]:
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HubError(f"{index}: not an index of weights (no weight_map); name a file in the address") from None
    missing = [name for name in shards if name not in names]
    if missing:
        raise HubError(f"{index}: names {missing[0]!r}, which the repository does not hold; it is incomplete")
    return shards


def _list(repo: str, revision: str) -> list[str]:
    """The files of a repository; those of them in the cache if the hub is out of reach."""
    try:
        return [sibling.rfilename for sibling in HfApi().model_info(repo, revision=revision).siblings or ()]
    except Exception as error:
        cached = _cached_names(repo, revision)
        if not _unreachable(error) or not cached:
            raise _explain(_address(repo, revision), error) from None
        return cached


def _cached_names(repo: str, revision: str) -> list[str]:
    folder = _repo_folder(repo)
    reference = folder / "refs" / revision
    snapshot = folder / "snapshots" / (reference.read_text() if reference.is_file() else revision)
    return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]


def _fetch_file(repo: str, revision: str, name: str) -> Path:
    """Puts one file into the cache and returns its path there."""
    where = _address(repo, revision, name)
    try:
        metadata = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), headers=build_hf_headers())
    except Exception as error:
        if not _unreachable(error):
            raise _explain(where, error) from None
        try:
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise _explain(where, error) from None
    if metadata.commit_hash is None or metadata.etag is None:
        raise HubError(
            f"{where}: {constants.ENDPOINT} does not answer as a hub does (a login or proxy page?); "
            "check HF_ENDPOINT and the proxy settings"
        )
    if re.fullmatch(r"[\w.-]+", metadata.etag) is None:  # it becomes a file name
        raise HubError(f"{where}: the server names it {metadata.etag!r:.80}, which is no hash; check HF_ENDPOINT")
    blob = _repo_folder(repo) / "blobs" / metadata.etag
    try:
        # Where links are not to be had, the cache holds files under their names only.
        if not isinstance(try_to_load_from_cache(repo, name, revision=metadata.commit_hash), str):
            _download(where, hf_hub_url(repo, name, revision=metadata.commit_hash), metadata, blob)
        path = Path(hf_hub_download(repo, name, revision=revision))
    except HubError:
        raise
    except Exception as error:
        raise _explain(where, error) from None
    if path.resolve() != blob.resolve() and path.resolve().name != path.name:  # the latter: a cache without links
        raise HubError(f"{where}: changed on the hub while it was fetched; run the command again")
    return path


def _download(where: str, url: str, metadata: HfFileMetadata, blob: Path) -> None:
    """Fetches ``url`` into ``blob``, which appears when it is whole and has the promised hash."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.partial")
    with WeakFileLock(lock):
        if blob.exists():  # another process was faster
            return
        have = partial.stat().st_size if partial.exists() else 0
        _check_space(where, metadata.size, have, blob.parent)
        begun = f", {have / 1e9:.2f} GB of it are here already" if have else ""
        print(f"fetching {where} ({(metadata.size or 0) / 1e9:.2f} GB{begun})", file=sys.stderr)
        try:
            with partial.open("ab") as file:
                http_get(
                    url,
                    file,
                    resume_size=have,
                    headers=build_hf_headers(),
                    expected_size=metadata.size,
                    displayed_filename=where.rsplit("/", 1)[-1],
                )
        except Exception as error:
            raise _incomplete(where, partial, metadata.size, error) from None
        _check_hash(where, partial, metadata.etag)
        partial.rename(blob)


def _check_space(where: str, size: int | None, have: int, folder: Path) -> None:
    needed, free = (size or 0) - have, shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{where}: needs {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free; "
            "make room, or set HF_HUB_CACHE to another disk"
        )


def _incomplete(where: str, partial: Path, size: int | None, error: Exception) -> HubError:
    have = partial.stat().st_size
    with partial.open("rb") as file:
        head = file.read(256).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        partial.unlink()
        return HubError(
            f"{where}: the server sent a web page in place of the file; log in (HF_TOKEN) or check the proxy"
        )
    if size is not None and have > size:
        partial.unlink()
        return HubError(f"{where}: the server sent {have} bytes, but the file has {size}; run the command again")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain(where, error)
    of = "" if size is None else f" of {size}"
    return HubError(
        f"{where}: arrived only in part, {have}{of} bytes ({_one_line(error)}); run the command again to continue"
    )


def _check_hash(where: str, partial: Path, etag: str | None) -> None:
    """The hub's etag is the sha256 of a large file, and git's sha1 of a small one."""
    if re.fullmatch("[0-9a-f]{64}", etag or ""):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", etag or ""):
        digest = hashlib.sha1(b"blob %d\0" % partial.stat().st_size, usedforsecurity=False)
    else:
        print(f"{where}: the server gives no hash, so only its size was checked", file=sys.stderr)
        return
    with partial.open("rb") as file:
        while block := file.read(_READ_NBYTES):
            digest.update(block)
    if digest.hexdigest() != etag:
        partial.unlink()
        raise HubError(
            f"{where}: has the hash {digest.hexdigest()}, but the hub promised {etag}; "
            "it was damaged on the way and is deleted, run the command again"
        )


def _address(repo: str, revision: str, name: str = "") -> str:
    at = "" if revision == constants.DEFAULT_REVISION else f"@{revision}"
    return f"{SCHEME}{repo}{at}/{name}".rstrip("/")


def _repo_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _unreachable(error: Exception) -> bool:
    """Whether the hub could not be asked at all, so that the cache may answer in its place."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, errors.OfflineModeIsEnabled) or type(error).__module__.startswith("httpx")


def _explain(where: str, error: Exception) -> HubError:
    login = "if it is private or gated, accept its terms on the hub and set HF_TOKEN"
    match error:
        case errors.OfflineModeIsEnabled():
            return HubError(
                f"{where}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset it or copy the cache"
            )
        case errors.GatedRepoError():
            return HubError(f"{where}: access is restricted; accept its terms on the hub and set HF_TOKEN")
        case errors.RepositoryNotFoundError():
            return HubError(f"{where}: the hub has no such repository; check the name, and {login}")
        case errors.RevisionNotFoundError():
            return HubError(f"{where}: the repository has no such revision; check what follows the @")
        case errors.EntryNotFoundError():
            return HubError(f"{where}: the repository has no such file; check the name")
        case errors.HfHubHTTPError():
            return HubError(
                f"{where}: {constants.ENDPOINT} answers with status {error.response.status_code}; try again later"
            )
    if _unreachable(error):
        return HubError(
            f"{where}: {constants.ENDPOINT} is out of reach ({_one_line(error)}), and the cache does not have it; "
            "check the network, HF_ENDPOINT and the proxy settings"
        )
    return HubError(f"{where}: cannot be fetched ({type(error).__name__}: {_one_line(error)})")


def _one_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]

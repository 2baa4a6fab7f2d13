"""Downloads from the Hugging Face hub, by addresses such as ``hf://EleutherAI/gpt-j-6b@float16/pytorch_model.bin``.

    hf://OWNER/NAME[@REVISION][/FILE]      FILE is optional if the repository holds one set of weights

Downloads go to the hub's own cache (``HF_HOME``, ``HF_HUB_CACHE``), shared with other programs. ``huggingface_hub``
discards the partial file of an interrupted program and compares only sizes. Here a partial download is resumed, also by
a later process, and a file enters the cache only if it has the hash that the server announced. ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``, ``HF_TOKEN`` and the proxy settings are honoured.
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
from magma_jax.output import size_text
from magma_jax.storage import package_file
from magma_jax.storage.objects.copies import local_copy

SCHEME = "hf://"

# Weight file names in order of preference. open_clip's come first: its repositories may also hold the same model under
# tensor names that are not supported here.
WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"),
    "mp_rank_00_model_states.pt",
)
# Small settings files, fetched with the weights if they exist.
SETTINGS = ("config.json", "tokenizer.json", "open_clip_config.json")

_READ_NBYTES = 2**24


class HubError(ValueError):
    """Failed download; one line with the address, the reason and the remedy."""


def local_path(source: str | Path) -> Path:
    """Local path of a source: ``hf://``, ``gs://`` and ``s3://`` addresses are downloaded, a path stays as it is.

    ``package://NAME/FILE`` is a file of an installed Python package, see ``storage.package_file``.

    Raises:
        HubError: the address is malformed, or the file does not exist, cannot be fetched or arrives incomplete.
        PackageFileError: a package that is not installed, or that lacks the file.
        StoreError: object storage that holds nothing there or cannot be read, see ``storage.objects``.
    """
    source = str(source)
    if source.startswith(package_file.SCHEME):
        return package_file.package_path(source)
    return fetch(source) if source.startswith(SCHEME) else local_copy(source)


def fetch(address: str) -> Path:
    """Downloads a file, or the weights and settings of a repository, unless they are cached.

    Returns:
        The file in the cache; for sharded weights their index, in the folder of all shards.

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
    if "model.json" in names:
        download = f"hf download {uri.id} --local-dir NAME"
        raise HubError(f"{address}: holds a model folder of this library; fetch it by {download}, and give the folder")
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
    """Chooses the weight file among the files of a repository."""
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
    """Files of a repository; if the hub is unreachable, those in the cache."""
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
    """Downloads one file to the cache and returns its path."""
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
    if re.fullmatch(r"[\w.-]+", metadata.etag) is None:  # used as a file name
        raise HubError(f"{where}: the server names it {metadata.etag!r:.80}, which is not a hash; check HF_ENDPOINT")
    blob = _repo_folder(repo) / "blobs" / metadata.etag
    try:
        # On systems without symlinks the cache stores files under their names only.
        if not isinstance(try_to_load_from_cache(repo, name, revision=metadata.commit_hash), str):
            _download(where, hf_hub_url(repo, name, revision=metadata.commit_hash), metadata, blob)
        path = Path(hf_hub_download(repo, name, revision=revision))
    except HubError:
        raise
    except Exception as error:
        raise _explain(where, error) from None
    if path.resolve() != blob.resolve() and path.resolve().name != path.name:  # the latter: a cache without symlinks
        raise HubError(f"{where}: changed on the hub while it was fetched; run the command again")
    return path


def _download(where: str, url: str, metadata: HfFileMetadata, blob: Path) -> None:
    """Downloads ``url`` to ``blob`` atomically, after a check of its size and hash."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.partial")
    with WeakFileLock(lock):
        if blob.exists():  # another process was faster
            return
        have = partial.stat().st_size if partial.exists() else 0
        _check_space(where, metadata.size, have, blob.parent)
        begun = f", {size_text(have)} of it are here already" if have else ""
        print(f"fetching {where} ({size_text(metadata.size or 0)}{begun})", file=sys.stderr)
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
            f"{where}: needs {size_text(needed)}, but {folder} has {size_text(free)} free; "
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
    """Checks a download against the hub's etag: SHA-256 of a large file, git's SHA-1 of a small one."""
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
    """Whether the hub is unreachable, so that the cache may be used instead."""
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

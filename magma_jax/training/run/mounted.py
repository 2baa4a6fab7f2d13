"""Mounted buckets that cannot rename folders, on which no checkpoint could be finished."""

import contextlib
import os
import re
import secrets
import shutil
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")


def rename_problem(workdir: Path) -> str | None:
    """Why checkpoints cannot be finished in a run folder on a FUSE file system; None if they can.

    A checkpoint is finished by renaming its folder. Cloud Storage FUSE renames a folder that holds files only if the
    bucket has a hierarchical namespace, or if the option ``rename-dir-limit`` is set.
    """
    parent = next(path for path in workdir.absolute().parents if path.is_dir())
    if not filesystem_type(parent).startswith("fuse"):
        return None
    name = f".rename-{secrets.token_hex(4)}"
    before, after = parent / name, parent / f"{name}-renamed"
    try:
        before.mkdir()
        (before / "file").write_bytes(b"file")
        os.rename(before, after)
    except OSError as error:
        return (
            f"{workdir}: a folder that holds files cannot be renamed here ({error.strerror}), so that no checkpoint "
            "could be finished; make the bucket with --enable-hierarchical-namespace, mount it with "
            "--rename-dir-limit=200000, or give the run folder as gs://BUCKET/FOLDER"
        )
    finally:
        for folder in (before, after):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
    return None


def filesystem_type(path: Path) -> str:
    """Type of the file system that a folder is on, as ``ext4`` or ``fuse.gcsfuse``; empty if unknown."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    found = ("", "")
    for line in lines:
        mount, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount.split()[4])
        # Of two mounts at the same place the later one covers the earlier one.
        if path.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, rest.split()[0])
    return found[1]

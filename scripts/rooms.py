"""Prints the rooms of the package: how many modules and lines each holds, and which rooms it imports.

python scripts/rooms.py
"""

import ast
import collections
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "magma_jax"

# Bottom up: a room may import those before it, not those after it. Families are above the parts they combine, and below
# the commands.
LAYERS = (
    ("typing", "config", "version", "output", "commands", "foreign", "family"),
    ("runtime",),
    ("nn",),
    ("storage",),
    ("data",),
    ("models",),
    ("published",),
    ("training",),
    ("inference",),
    ("evaluation", "retrieval"),
    ("families",),
    ("convert", "plan", "serve", "generate"),
    ("cli",),
)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name of every module below the package to its file; a package is named without ``__init__``."""
    found = {}
    for file in sorted((root / PACKAGE).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module to the modules of the package that it imports, anywhere in its code."""
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in files}
            elif isinstance(node, ast.ImportFrom) and node.module in files:
                children = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= (children & files.keys()) or {node.module}
    return graph


def layer(module: str) -> int:
    """Index of a module's layer; the package itself, which imports lazily, is above all others, and command lines are
    in the last layer.

    Raises:
        ValueError: a room that ``LAYERS`` does not name.
    """
    _, _, inner = module.partition(".")
    if not inner:
        return len(LAYERS)
    if inner.endswith("__main__"):  # a command
        return len(LAYERS) - 1
    room = inner.split(".")[0]
    for number, rooms in enumerate(LAYERS):
        if room in rooms:
            return number
    raise ValueError(f"{module}: its room stands in no layer; add it to scripts/rooms.py")


def room(module: str) -> str:
    """The folder of a module, or the module itself if it is directly in the package's folder."""
    parts = module.split(".")
    return ".".join(parts[1:3]) if len(parts) > 3 else ".".join(parts[1:])


def main() -> None:
    """Prints one line per folder."""
    files = modules()
    graph = imports(files)
    folders = collections.defaultdict(list)
    for name, file in files.items():
        folders[file.parent.relative_to(ROOT)].append(name)
    print(f"{'folder':38} files  lines  imports from")
    for folder, names in sorted(folders.items()):
        lines = sum(len(files[name].read_text(encoding="utf-8").splitlines()) for name in names)
        asked = {other.split(".")[1] for name in names for other in graph[name] if "." in other}
        asked -= {folder.parts[1]} if len(folder.parts) > 1 else set()
        print(f"{folder!s:38} {len(names):5}  {lines:5}  {', '.join(sorted(asked))}")


if __name__ == "__main__":
    main()

"""Progress of a conversion: a line with the output's size, and a bar on a terminal."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from magma_jax.output import size_text


@contextlib.contextmanager
def writing(path: str | Path, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Prints the output's path and size on standard error; yields a callback that takes the bytes written."""
    existing = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    print(f"{path}: writing {size_text(nbytes)}, {size_text(free)} are free", file=sys.stderr)
    # disable=None: no bar in a log file.
    with tqdm(total=nbytes, unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:

        def done(nbytes: int) -> None:
            bar.update(nbytes)

        yield done

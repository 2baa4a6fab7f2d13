"""How every command reads its arguments and ends.

Exit status: 0 done; 1 looked and found a difference, something that does not fit, or a loss that is no number;
2 unusable input, one line on standard error; 130 interrupted by Ctrl-C. A bug is a traceback.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from magma_jax.output import FailedError, error_line, printable

FOUND, UNUSABLE, INTERRUPTED = 1, 2, 130

# The package's own errors are ValueErrors, each of which says what is wrong with which value. FailedError is for what
# the input is not to blame for, MemoryError for sizes that a file claims to have, FloatingPointError for a loss that is
# no number.
ERRORS = (ValueError, OSError, MemoryError, FloatingPointError, FailedError)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        name = self.prog.removeprefix("python -m ")
        self.exit(UNUSABLE, f"{printable(' '.join(f'{name}: {message}'.split()))}; --help lists what it takes\n")


def run(name: str, work: Callable[[], int | None], *, resumable: bool = False) -> int:
    """Does the work of a command; returns its exit status, which is 0 where ``work`` returns None.

    Args:
        name: of the command, in front of its error.
        work: what it does; errors that it may raise are ``ERRORS``.
        resumable: whether the same command goes on after an interruption.
    """
    try:
        return work() or 0
    except ERRORS as error:
        said = "not enough memory" if isinstance(error, MemoryError) and not str(error) else error_line(error)
        print(f"{name}: {said}", file=sys.stderr)
        return FOUND if isinstance(error, FloatingPointError) else UNUSABLE
    except KeyboardInterrupt:
        print(f"{name}: interrupted{'; the same command goes on' if resumable else ''}", file=sys.stderr)
        return INTERRUPTED

"""Argument parsing and exit statuses of all commands.

Exit status: 0 success; 1 a check found a difference or a misfit, or the loss is not finite; 2 unusable input, with
one line on standard error; 130 interrupted by Ctrl-C; 143 a training run that a signal stopped, with a checkpoint from
which the same command continues. A bug gives a traceback and status 1. One of several processes that ends because
another one failed has status 1, or 134 if JAX aborts it.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from magma_jax.output import FailedError, OutputError, check_local, error_line, object_address, printable

# 143 is 128 + SIGTERM, as from a process without a handler: schedulers know it, and neither is a run complete.
FOUND, UNUSABLE, INTERRUPTED, STOPPED = 1, 2, 130, 143

# Errors reported in one line instead of a traceback. ValueError: the package's own errors. FailedError: failures that
# the input did not cause. MemoryError: sizes that a file claims. FloatingPointError: a loss that is not finite.
ERRORS = (ValueError, OSError, MemoryError, FloatingPointError, FailedError)


# An address of storage other than a disk, alone or as a setting's value.
_STORED = re.compile(r"([\w.]+=)?(gs|s3|az|abfss?|file|hdfs)://\S+$")
# Settings of a run that may be in object storage.
_STORED_SETTINGS = re.compile(r"(base|weights\.[\w.]+)=")


class ObjectAddress(str):
    """An argument that is an address in object storage and may be one."""


def place(text: str) -> "Path | ObjectAddress":
    """Type of arguments that are local paths, or addresses in object storage."""
    return Path(text) if (address := object_address(text)) is None else ObjectAddress(address)


def source(text: str) -> str:
    """Type of arguments that are local paths, addresses in object storage, or others such as ``hf://``."""
    return text if (address := object_address(text)) is None else ObjectAddress(address)


# The command as its user wrote it, if not by the module's own name.
_called: str | None = None


@contextlib.contextmanager
def called(name: str) -> Iterator[None]:
    """Usage texts and errors speak of the command by this name."""
    global _called
    before, _called = _called, name
    try:
        yield
    finally:
        _called = before


def script(name: str) -> str:
    """How to call train.py or eval.py, in messages: by the one command that holds all others if that was called."""
    installed, _, _ = (_called or "").partition(" ")
    return f"{installed} {name}" if installed else f"python {name}.py"


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser with one-line errors."""

    def __init__(self, prog: str | None = None, **options: Any):
        # Subcommands get the name of their parent, which is right already.
        super().__init__(prog=prog if _called is None or (prog or "").startswith(_called) else _called, **options)

    def parse_known_args(self, *arguments: Any, **options: Any) -> tuple[Any, list[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parsed, rest = super().parse_known_args(*arguments, **options)
        for value in vars(parsed).values():
            for one in value if isinstance(value, list) else [value]:
                try:
                    _check_place(one)
                except OutputError as error:
                    self.error(str(error))
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        name = self.prog.removeprefix("python -m ")
        self.exit(UNUSABLE, f"{printable(' '.join(f'{name}: {message}'.split()))}; see --help\n")


def status_of(error: BaseException) -> int:
    """Exit status of a command that an error ends."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return UNUSABLE if isinstance(error, ERRORS) and not isinstance(error, FloatingPointError) else FOUND


def _check_place(argument: object) -> None:
    """Refuses addresses of storage where only a local path will do."""
    if isinstance(argument, Path):
        check_local(argument)
    # Other texts may be prompts, and addresses of images or of the hub.
    elif isinstance(argument, str) and not isinstance(argument, ObjectAddress) and _STORED.match(argument):
        setting, _, value = argument.rpartition("=")
        if not (_STORED_SETTINGS.match(f"{setting}=") and object_address(value)):
            check_local(value)


def run(name: str, work: Callable[[], int | None], *, resumable: bool = False) -> int:
    """Runs a command and returns its exit status; 0 if ``work`` returns None.

    Args:
        name: command name, the prefix of error messages.
        work: body of the command; ``ERRORS`` that it raises are reported in one line.
        resumable: whether rerunning the same command continues after an interruption.
    """
    name = _called or name
    try:
        return work() or 0
    except ERRORS as error:
        said = "not enough memory" if isinstance(error, MemoryError) and not str(error) else error_line(error)
        print(f"{name}: {said}", file=sys.stderr)
        return status_of(error)
    except KeyboardInterrupt:
        print(f"{name}: interrupted{'; run the same command again to continue' if resumable else ''}", file=sys.stderr)
        return INTERRUPTED

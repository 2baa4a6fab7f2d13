"""All commands under one name: ``magma-jax train``, or ``python -m magma_jax train``."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from magma_jax import __version__, commands
from magma_jax.runtime.ending import end_process

# Command to the module whose ``main`` it is, and what it does.
COMMANDS = {
    "train": ("magma_jax.cli.train", "trains a model from a config"),
    "sweep": ("magma_jax.cli.sweep", "trains one run for every combination of config values"),
    "eval": ("magma_jax.cli.evaluate", "evaluates a run, or a checkpoint on a task"),
    "generate": ("magma_jax.generate.__main__", "asks a model about images, or for images"),
    "serve": ("magma_jax.serve.__main__", "serves a model over HTTP"),
    "convert": ("magma_jax.convert.__main__", "converts, composes, verifies and exports checkpoints"),
    "data": ("magma_jax.data.__main__", "converts and shows datasets"),
    "retrieval": ("magma_jax.retrieval.__main__", "builds and searches memory banks"),
    "plan": ("magma_jax.plan.__main__", "plans a run for a TPU topology"),
    "evaluation": ("magma_jax.evaluation.__main__", "scores prediction files"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print("usage: magma-jax COMMAND [options]; magma-jax COMMAND --help says more\n")
        print("\n".join(f"  {command:12}{does}" for command, (_, does) in COMMANDS.items()))
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"magma-jax: no command {name!r:.80}; there are {known}", file=sys.stderr)
        return commands.UNUSABLE
    with commands.called(f"magma-jax {name}"):
        return importlib.import_module(COMMANDS[name][0]).main(words[1:])


def run() -> NoReturn:
    """The command ``magma-jax``."""
    end_process(main())


if __name__ == "__main__":
    run()

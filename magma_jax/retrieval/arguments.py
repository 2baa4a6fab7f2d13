"""Arguments of commands whose model reads documents of a memory bank."""

import argparse
from pathlib import Path
from typing import Any


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that ``with_memory`` reads."""
    group = parser.add_argument_group("memory of a model that reads documents")
    add = group.add_argument
    add("--memory", type=Path, metavar="BANK", help="folder of retrieval build; its documents are retrieved by text")
    add("--memory-encoder", default="hashed", help="the encoder that made it; default: %(default)s")
    add("--memory-weights", metavar="FILE", help="file of the encoder's weights, if it needs one")
    add("--memory-data", metavar="DATA", help="where its images are, if the bank has no codes: openmoji, or a folder")
    add("--documents", type=int, default=2, help="documents of a prompt; default: %(default)s")
    add("--max-similarity", type=float, default=0.9, help="largest cosine of two documents; default: %(default)s")
    add("--decay", type=float, default=1.0, help="weight of what an earlier document has already; default: %(default)s")


def with_memory(model: Any, arguments: argparse.Namespace) -> Any:
    """The model, with the memory that the arguments name, if any.

    Raises:
        ValueError: a model that reads no documents. Also the errors of ``memory.open_memory``.
    """
    if arguments.memory is None:
        return model
    from magma_jax.inference.generator import ReadsDocuments  # here: parsing arguments needs no JAX
    from magma_jax.retrieval.memory import open_memory

    if not isinstance(model, ReadsDocuments):
        raise ValueError(f"--memory: the model of {arguments.checkpoint} reads no documents; leave it out")
    memory = open_memory(
        arguments.memory,
        arguments.memory_encoder,
        arguments.memory_weights,
        arguments.memory_data,
        image_size=model.image_size,
        count=arguments.documents,
        max_similarity=arguments.max_similarity,
        decay=arguments.decay,
    )
    return model.with_memory(memory)

"""Opens a GGUF file as a language model: its config and its weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from magma_jax.models.language.gated import GatedConfig
from magma_jax.published.gguf.config import config_of
from magma_jax.published.gguf.names import hugging_face_tensors
from magma_jax.published.hf.fields import LanguageModelError
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.gguf.tensors import open_gguf


@contextlib.contextmanager
def open_gguf_model(path: Path) -> Iterator[tuple[GatedConfig, dict[str, Deferred]]]:
    """Config and lazy tensors, under Hugging Face's names, of the language model in a file.

    Raises:
        WeightFileError: a damaged file. LanguageModelError: an unsupported model.
    """
    file, metadata, tensors = open_gguf(path)
    with contextlib.closing(file):
        try:
            config = config_of(metadata, tensors)
        except LanguageModelError as error:
            raise LanguageModelError(f"{path}: {error}") from None
        yield config, hugging_face_tensors(tensors, config)

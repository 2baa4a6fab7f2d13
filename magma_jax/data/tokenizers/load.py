"""Tokenizers that a config names."""

from pathlib import Path

from magma_jax.config import ConfigError
from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer
from magma_jax.data.tokenizers.gguf import read_gguf_tokenizer
from magma_jax.storage.gguf.tensors import is_gguf
from magma_jax.storage.package_file import SCHEME, package_path


def load_tokenizer(name: str | None) -> Tokenizer:
    """The tokenizer that a config names: ``gpt2`` or None, a ``tokenizer.json``, a folder with one, or a GGUF file.

    The file may be part of an installed package, see ``storage.package_file``.

    Raises:
        ConfigError: it is not there, or its vocabulary is not offered. WeightFileError: a damaged GGUF file.
        PackageFileError: no such package.
    """
    if name in (None, "gpt2"):
        return gpt2_tokenizer()
    path = package_path(name) if name.startswith(SCHEME) else Path(name)
    # A model folder has its vocabulary in tokenizer/.
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    if not path.exists():
        raise ConfigError(
            f"data.tokenizer: {path} is not there; give gpt2, a tokenizer.json, its folder or a GGUF file"
        )
    return read_gguf_tokenizer(path) if is_gguf(path) else Tokenizer.load(path)

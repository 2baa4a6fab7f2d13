"""Published language models as the frozen part of a model.

Sizes that tensors do not show (heads, rotary features, eps) are compared with the ``config.json`` beside the weights,
or with the metadata of a GGUF file.
The embedding table and the head may be cut to the config's rows: GPT-J's 50,400 rows are GPT-2's 50,257 tokens plus
untrained padding, of which MAGMA keeps one row for ``<|image|>``, which makes 50,258. Rows are never added: MAGMA
replaces ``<|image|>`` by the image's vectors, so the token needs no row, and a new row in a table tied to the head
would compete with trained ones for every next token.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer
from magma_jax.data.tokenizers.gguf import read_gguf_tokenizer
from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.models.language.decoder import Decoder, DecoderConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.gguf.open import open_gguf_model
from magma_jax.published.hf_config import read_config
from magma_jax.published.keymap.engine import KeyMapError, to_ours
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.published.mesh_transformer import is_mesh_transformer, mesh_transformer_files, open_mesh_transformer
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.files import open_tensors
from magma_jax.storage.gguf.tensors import is_gguf

# Config fields that this library chooses, not the published model.
_FREE = ("vocab_rows", "head_rows", "context_length", "embedding_std", "dtype")
_GPT2_VOCABULARY = ("gptj", "gpt2", "gpt_neo")
# A vocabulary must give it back: prompts are encoded in parts, and answers are decoded token by token.
_TEXT = " a  b,\n\u00e9 \u732b"
# Parameters whose row count a config field gives.
_TABLES = {"vocab_rows": ("wte/weight",), "head_rows": ("lm_head/weight", "lm_head/bias")}


@contextlib.contextmanager
def open_lm(path: str | Path, config: LanguageModelConfig) -> Iterator[tuple[dict[str, Deferred], tuple[Path, ...]]]:
    """Opens a language model's weights: a lazy tensor for every parameter of ``config``, and the files.

    Args:
        path: a Hugging Face folder (or one of its files), a GGUF file, or a slim checkpoint of mesh-transformer-jax.
        config: config and dtype of the model; it may have fewer rows than the file, see above.

    Raises:
        ConfigError: the file holds a model of other sizes, or too few rows. LanguageModelError: no readable
        ``config.json``. WeightFileError, TorchFileError: the weights cannot be read. KeyMapError: tensors that do not
        match the model.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        if is_mesh_transformer(path):
            if config.kind != "gptj":
                raise ConfigError(f"{path}: holds a gptj, but the config's language model is a {config.kind}")
            tensors: Mapping[str, Any] = open_mesh_transformer(path)
            files = mesh_transformer_files(path)
        elif is_gguf(path):
            found, tensors = stack.enter_context(open_gguf_model(path))
            files = (path,)
            _compare(path, found, config)
        else:
            _compare(path, read_config(path), config)
            weights = stack.enter_context(open_tensors(path))
            tensors, files = weights.tensors, weights.files
        table = language_model_table(config, tensors)
        whole = dataclasses.replace(config, **_rows(config, table, tensors))
        shapes = abstract(lambda: Decoder(whole, rngs=nnx.Rngs(0)))[1]
        try:
            plan = to_ours(table, tensors, shapes)
        except KeyMapError as error:
            raise KeyMapError(f"{path}: {error}") from None
        for field, paths in _TABLES.items():
            if hasattr(config, field):
                plan |= {name: _cut(path, plan[name], config, field) for name in paths if name in plan}
        yield plan, files


def read_tokenizer(path: str | Path, config: LanguageModelConfig) -> Tokenizer:
    """Vocabulary of a published language model: GPT-2's, the one in a GGUF file, or the ``tokenizer.json`` beside the
    weights.

    Raises:
        ConfigError: a model with a vocabulary of its own, and no readable one; one of another model, with more words
            than the embedding table has rows, or a usual word for an end of text that is named beside it; one that does
            not give a text back as it was.
    """
    words = _vocabulary(path, config)
    if config.kind not in _GPT2_VOCABULARY and words.vocab_size > config.vocab_rows:
        raise ConfigError(
            f"{path}: the vocabulary has {words.vocab_size} words, but model.lm.vocab_rows is {config.vocab_rows}; it "
            "belongs to another model"
        )
    return words


def _vocabulary(path: str | Path, config: LanguageModelConfig) -> Tokenizer:
    if config.kind in _GPT2_VOCABULARY:
        return gpt2_tokenizer()
    path = Path(path)
    if is_gguf(path):
        return read_gguf_tokenizer(path)
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    try:
        words = Tokenizer.load(file)
    except OSError as error:
        raise ConfigError(f"{file}: no vocabulary of this language model ({error}); fetch it too") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    again = b"".join(map(words.token_bytes, words.encode(_TEXT))).decode(errors="replace")
    if again != _TEXT:
        raise ConfigError(
            f"{file}: turns the text {_TEXT!r} into {again!r}; vocabularies that change texts are not offered"
        )
    return words


def _compare(path: Path, found: DecoderConfig, config: LanguageModelConfig) -> None:
    if found.kind != config.kind:
        raise ConfigError(f"{path}: holds a {found.kind}, but the config's language model is a {config.kind}")
    differing = [
        f"{field.name} {getattr(found, field.name)}, not {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name not in _FREE and getattr(found, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise ConfigError(f"{path}: does not fit model.lm of the config: it has {', '.join(differing)}")


def _rows(config: LanguageModelConfig, table: list[Any], tensors: Mapping[str, Any]) -> dict[str, int]:
    """Row counts of the file, which may differ from its own ``config.json``."""
    rows = {}
    fields = [field.name for field in dataclasses.fields(config)]
    for entry in table:
        for field, paths in _TABLES.items():
            if field in fields and getattr(entry, "ours", None) == paths[0] and entry.theirs in tensors:
                rows[field] = tensors[entry.theirs].shape[0]
    return rows


def _cut(path: Path, tensor: Deferred, config: LanguageModelConfig, field: str) -> Deferred:
    wanted, found = getattr(config, field), tensor.shape[0]
    if wanted == found:
        return tensor
    if wanted > found:
        raise ConfigError(
            f"{path}: has {found} rows where model.lm.{field} asks for {wanted}; set it to {found} "
            "(<|image|> needs no row, and rows are not made up)"
        )
    if wanted < (words := _vocabulary(path, config).vocab_size):
        raise ConfigError(f"{path}: model.lm.{field} {wanted} would cut off words; the vocabulary has {words}")
    return dataclasses.replace(tensor, shape=(wanted, *tensor.shape[1:]), read=lambda: tensor.read()[:wanted])

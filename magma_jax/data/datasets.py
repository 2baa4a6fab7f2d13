"""Registry of training datasets: a config dataclass and an open function per ``kind``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from magma_jax.config import from_union
from magma_jax.data.code_pairs import CodePairsConfig, open_code_pairs
from magma_jax.data.codes_dataset import CodesConfig, open_codes
from magma_jax.data.dataset import Dataset
from magma_jax.data.documents.folders import DocumentFoldersConfig, open_document_folders
from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig, open_openmoji_documents
from magma_jax.data.documents.openmoji_edits import OpenmojiEditsConfig, open_openmoji_edits
from magma_jax.data.folder_dataset import FoldersConfig, open_folders
from magma_jax.data.openmoji.dataset import (
    OpenmojiConfig,
    OpenmojiTextConfig,
    open_openmoji,
    open_openmoji_text,
)
from magma_jax.data.openmoji.pairs import OpenmojiPairsConfig, open_openmoji_pairs

DataConfig = (
    OpenmojiConfig
    | OpenmojiTextConfig
    | OpenmojiPairsConfig
    | OpenmojiDocumentsConfig
    | OpenmojiEditsConfig
    | FoldersConfig
    | CodesConfig
    | CodePairsConfig
    | DocumentFoldersConfig
)

OPENERS: dict[type, Callable[[Any], Dataset]] = {
    OpenmojiConfig: open_openmoji,
    OpenmojiTextConfig: open_openmoji_text,
    OpenmojiPairsConfig: open_openmoji_pairs,
    FoldersConfig: open_folders,
    CodesConfig: open_codes,
    CodePairsConfig: open_code_pairs,
    DocumentFoldersConfig: open_document_folders,
    OpenmojiDocumentsConfig: open_openmoji_documents,
    OpenmojiEditsConfig: open_openmoji_edits,
}


def load_dataset(config: DataConfig) -> Dataset:
    """Loads, builds or opens the dataset of a config.

    Raises:
        ConfigError: a config without folders. DataError: folders that cannot be read.
    """
    return OPENERS[type(config)](config)


def read_stored_config(values: Mapping[str, Any], where: str = "model.json: run.data") -> DataConfig:
    """Reads a run's data config from its folder's metadata.

    Raises:
        ConfigError: an unknown kind or field.
    """
    return from_union(tuple(OPENERS), current_fields(values), where)


def current_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the fields of a stored config to their current names.

    Release 0.1 had one dataclass for all kinds, with ``name`` in place of ``kind`` and the fields of all kinds.
    """
    if "name" not in stored:
        return dict(stored)
    kind = next((config for config in OPENERS if config.kind == stored["name"]), None)
    own = {field.name for field in dataclasses.fields(kind)} if kind else stored.keys() - {"name"}
    return {"kind": stored["name"]} | {name: value for name, value in stored.items() if name in own}

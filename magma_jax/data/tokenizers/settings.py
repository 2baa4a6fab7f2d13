"""What stands beside the ``tokenizer.json`` of a published language model: special tokens, ends of text and the chat
template.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magma_jax.foreign import read_json, read_text, shown

SETTINGS_FILE = "tokenizer_config.json"
# Older folders name special tokens here.
_NAMES_FILE = "special_tokens_map.json"
# The ends of text stand in the first of these that names any.
GENERATION_FILE = "generation_config.json"
_ENDS_FILES = (GENERATION_FILE, "config.json")
_ENDS = "eos_token_id"
# Newer folders hold the chat template in a file of its own.
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_NBYTES = 256 * 2**10
# Of several templates of a folder, the one for chats.
_CHAT = "default"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """Settings of a published tokenizer that its ``tokenizer.json`` lacks.

    Attributes:
        names: special tokens by the names that chat templates use, such as ``bos_token``, as pairs.
        chat_template: the chat template, in Jinja; None for none.
        ends: ids that end an answer, beside ``eos_token``: Llama 3 ends messages by ``<|eot_id|>``, Gemma turns by
            ``<end_of_turn>``.
    """

    names: tuple[tuple[str, str], ...] = ()
    chat_template: str | None = None
    ends: tuple[int, ...] = ()

    @property
    def special(self) -> dict[str, str]:
        """``names`` as a dict."""
        return dict(self.names)

    def write(self, folder: Path) -> None:
        """Writes the files that ``read_settings`` reads; none if there is nothing to say."""
        if self.names:
            text = json.dumps(self.special, ensure_ascii=False)
            (folder / SETTINGS_FILE).write_text(f"{text}\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / CHAT_TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8", newline="")
        if self.ends:
            text = json.dumps({_ENDS: list(self.ends)})
            (folder / GENERATION_FILE).write_text(f"{text}\n", encoding="utf-8")

    def as_json(self) -> str:
        """As JSON text, see ``settings_of``."""
        chat = {} if self.chat_template is None else {"chat_template": self.chat_template}
        ends = {_ENDS: list(self.ends)} if self.ends else {}
        return json.dumps({**self.special, **chat, **ends})


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads the settings of a folder; defaults where it has no such files.

    Raises:
        ValueError: a file that is not readable, or holds values of other types.
    """
    return settings_of(read_fields(folder))


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of a folder's ``tokenizer_config.json`` and of the files beside it. Raises as ``read_settings``."""
    content = _named(folder, _NAMES_FILE) | _named(folder, SETTINGS_FILE)
    content[_ENDS] = next((found[_ENDS] for name in _ENDS_FILES if _ENDS in (found := _named(folder, name))), [])
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        try:
            content["chat_template"] = read_text(folder / CHAT_TEMPLATE_FILE, MAX_TEMPLATE_NBYTES)
        except ValueError as error:
            raise ValueError(f"has a {CHAT_TEMPLATE_FILE} that {error}") from None
    return content


def _named(folder: Path, name: str) -> dict[str, Any]:
    """The fields of a file, without those that are null; none of a file that is not there."""
    if not (folder / name).is_file():
        return {}
    try:
        found = read_json(folder / name)
    except ValueError as error:
        raise ValueError(f"has a {name} beside it that cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"has a {name} that holds no settings, but {shown(found, 40)}")
    return {key: value for key, value in found.items() if value is not None}


def settings_of(content: Mapping[str, Any]) -> TokenizerSettings:
    """The settings in the fields of a ``tokenizer_config.json``.

    Raises:
        ValueError: fields of other types.
    """
    names = {}
    for key in _NAMES:
        value = content.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise ValueError(f"has an {key} in its {SETTINGS_FILE} that is no text")
        if value is not None:
            names[key] = value
    return TokenizerSettings(
        tuple(names.items()), _chat_template(content.get("chat_template")), _ends(content.get(_ENDS, []))
    )


def _ends(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"has an {_ENDS} that is neither an id nor a list of ids, but {shown(value, 40)}")
    return tuple(dict.fromkeys(ids))


def _chat_template(value: Any) -> str | None:
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get(_CHAT)
    if value is not None and not isinstance(value, str):
        raise ValueError("has a chat_template that is no text")
    if value is not None and len(value) > MAX_TEMPLATE_NBYTES:
        raise ValueError(f"has a chat_template of more than {MAX_TEMPLATE_NBYTES} characters")
    return value

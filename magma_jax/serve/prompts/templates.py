"""Chat templates: convert messages to the prompt format of a model.

A completion model without roles answers ``Q: Is it a cat? A:`` but not ``Is it a cat?`` or the prompts of evaluation
harnesses. A template is ``raw`` (contents concatenated unchanged), one of the Jinja files in the folder ``templates``
beside this file, or a Jinja file of the user.

A Jinja template gets ``messages``, each with ``role``, ``text`` (its texts, one per line), ``images``, and ``content``,
a list of ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": ...}``. Printing an image places it in the
prompt. Templates run in Jinja's sandbox.
"""

import dataclasses
import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import jinja2

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.data.tokenizers.settings import read_settings
from magma_jax.serve.errors import RequestError
from magma_jax.serve.prompts.chat import ChatTemplate
from magma_jax.serve.prompts.sandbox import TemplateError, compiled, rendered, sandbox
from magma_jax.serve.prompts.wording import asks_for_caption, bare_question, is_worded
from magma_jax.serve.requests.schema import ImagePart, ImageURL, Items, Message, MessagesRequest, contents
from magma_jax.storage.model_folder import MODEL_FILE, read_model_json

RAW = "raw"
# Default template in a model folder.
TEMPLATE_FILE = "template.jinja"
# Kind of the quick start's data, and its default template.
OPENMOJI, OPENMOJI_TEMPLATE = "openmoji", "qa"
MAX_TEMPLATE_BYTES = 64 * 2**10
# Name of the chat template of a model's tokenizer.
CHAT = "chat"


class Template(Protocol):
    """Function from messages to texts and images in prompt order."""

    def __call__(self, messages: Sequence[Message]) -> Items: ...


def raw(messages: Sequence[Message]) -> Items:
    """Concatenates the contents unchanged.

    An assistant's answer gets a space before and a line break after it, as in a few-shot prompt.
    """
    items: Items = []
    for i, message in enumerate(messages):
        found = contents(message.parts)
        if message.role == "assistant":
            text = "".join(map(str, found)).strip()
            found = [f" {text}" + ("\n" if i + 1 < len(messages) else "")]
        items += found
    return [item for item in items if item != ""]


class JinjaTemplate:
    """Jinja template.

    Raises:
        TemplateError: not Jinja, or it fails on an image with a question.
    """

    def __init__(self, source: str, name: str):
        self._template = compiled(_environment(), source, name)
        sample = Message(role="user", content=[ImagePart(type="image_url", image_url=ImageURL(url=""))])
        try:
            self([sample, Message(role="assistant", content="a"), Message(role="user", content="a?")])
        except RequestError as error:
            raise TemplateError(f"{name}: {error}") from None

    def __call__(self, messages: Sequence[Message]) -> Items:
        # Secret, so that no client's text can imitate an image.
        mark = f"\ufffc{secrets.token_hex(8)}:"
        images: list[ImageURL] = []
        seen = [_shown(message, mark, images) for message in messages]
        written = rendered(self._template, "the server's template", {"messages": seen, **_ALSO_GIVEN})
        # Texts and image numbers alternate.
        parts = re.split(f"{mark}(\\d+)\ufffc", written)
        missing = set(range(len(images))) - {int(number) for number in parts[1::2]}
        if missing:
            raise RequestError(f"the server's template leaves out image {min(missing) + 1} of {len(images)}")
        items = [images[int(part)] if i % 2 else part for i, part in enumerate(parts)]
        return [item for item in items if item != ""]


@dataclasses.dataclass(frozen=True)
class Templates:
    """Templates of a server: built-in and additional ones.

    Attributes:
        default: name of the default template.
        own: additional templates by name.
    """

    default: str = RAW
    own: Mapping[str, Template] = dataclasses.field(default_factory=dict)

    def items(self, wanted: MessagesRequest) -> Items:
        """Texts and images of a request in prompt order.

        Raises:
            RequestError: no such template, or it fails on the messages.
        """
        return self._named(wanted.template or self.default)(wanted.messages)

    def is_raw(self, wanted: MessagesRequest) -> bool:
        """Whether a request uses the template ``raw``."""
        return (wanted.template or self.default) == RAW

    def _named(self, name: str) -> Template:
        if name in self.own:
            return self.own[name]
        if name == RAW:
            return raw
        if name not in shipped():
            names = ", ".join([RAW, *shipped(), *self.own])
            raise RequestError(f"template: {name!r:.80} is not among {names}", param="template")
        return shipped_template(name)


def templates_for(checkpoint: str | Path, wanted: str | None = None) -> Templates:
    """Templates for serving ``checkpoint``; ``wanted`` is a name or a file.

    The default is the checkpoint's ``template.jinja``, else ``qa`` for a run on the quick start's drawings, else the
    ``chat`` template of its tokenizer, else ``raw``.

    Raises:
        TemplateError: no such template, or an unusable one. A chat template that is not ``wanted`` may be unusable.
    """
    try:
        chat = _chat_of(Path(checkpoint) / "tokenizer")
    except TemplateError as error:
        if wanted is None or wanted == CHAT:
            raise TemplateError(f"{error}; --template {RAW} does without it") from None
        chat = {}
    if wanted in (RAW, *shipped(), *chat):
        return Templates(wanted, chat)
    file = Path(checkpoint) / TEMPLATE_FILE if wanted is None else Path(wanted)
    if file.is_file():
        return Templates(file.name, {**chat, file.name: _read_template(file)})
    if wanted is not None:
        raise TemplateError(f"{wanted}: neither a file nor one of {', '.join([RAW, *shipped(), *chat])}")
    if (Path(checkpoint) / MODEL_FILE).is_file():
        run = read_model_json(checkpoint).get("run")
        data = run.get("data") if isinstance(run, dict) else None
        # Release 0.1 stored it as name.
        if isinstance(data, dict) and OPENMOJI in (data.get("kind"), data.get("name")):
            return Templates(OPENMOJI_TEMPLATE, chat)
    return Templates(CHAT if chat else RAW, chat)


def _chat_of(folder: Path) -> dict[str, Template]:
    """The chat template of a tokenizer's folder by its name; none if it has none."""
    try:
        if read_settings(folder).chat_template is None:
            return {}
        return {CHAT: ChatTemplate(Tokenizer.load(folder))}
    except TemplateError as error:
        raise TemplateError(f"{folder}: {error}") from None
    except (OSError, ValueError) as error:
        raise TemplateError(f"{folder}: no tokenizer with a chat template ({error})") from None


@functools.cache
def shipped() -> tuple[str, ...]:
    """Names of the built-in templates, without ``raw``."""
    files = (resources.files("magma_jax.serve.prompts") / "templates").iterdir()
    return tuple(sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja")))


@functools.cache
def shipped_template(name: str) -> Template:
    """Loads a built-in template."""
    file = resources.files("magma_jax.serve.prompts") / "templates" / f"{name}.jinja"
    return JinjaTemplate(file.read_text(encoding="utf-8"), name)


def _read_template(file: Path) -> Template:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_TEMPLATE_BYTES + 1)
        if len(content) > MAX_TEMPLATE_BYTES:
            raise TemplateError(f"{file}: more than {MAX_TEMPLATE_BYTES} bytes; is it a template?")
        return JinjaTemplate(content.decode(), str(file))
    except OSError as error:
        raise TemplateError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise TemplateError(f"{file}: not UTF-8 (byte {error.start})") from None


# Other variables used by templates written for transformers.
_ALSO_GIVEN = {"add_generation_prompt": True, "tools": None, "documents": None, "bos_token": "", "eos_token": ""}


def _shown(message: Message, mark: str, images: list[ImageURL]) -> dict[str, Any]:
    """Template variables of a message; its images are added to ``images``."""
    content, marks = [], []
    for item in contents(message.parts):
        if isinstance(item, ImageURL):
            marks.append(f"{mark}{len(images)}\ufffc")
            content.append({"type": "image", "image": marks[-1]})
            images.append(item)
        else:
            content.append({"type": "text", "text": item})
    text = "\n".join(part["text"] for part in content if part["type"] == "text")
    return {"role": message.role, "name": message.name, "text": text, "images": marks, "content": content}


@functools.cache
def _environment() -> jinja2.Environment:
    made = sandbox(jinja2.StrictUndefined)
    made.filters["question"] = bare_question
    made.tests["worded"] = is_worded
    made.tests["caption_request"] = asks_for_caption
    return made

"""Templates: from the messages of a chat to the wording that a model knows.

A model that continues text and knows no roles answers ``Q: Is it a cat? A:`` and not ``Is it a cat?``, let alone what
evaluation harnesses write. A template is ``raw`` (contents follow each other as they are), one of the Jinja files in
the folder ``templates`` beside this file, or a Jinja file of the user.

A Jinja template sees ``messages``: each has ``role``, ``text`` (its texts, a line each), ``images``, and ``content``, a
list of ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": ...}``. What it writes for an image stands
where the image shall be. It runs in Jinja's sandbox.
"""

import dataclasses
import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from magma_jax.serve.errors import RequestError
from magma_jax.serve.prompts.wording import asks_for_caption, bare_question, is_worded
from magma_jax.serve.requests.schema import ImagePart, ImageURL, Items, Message, MessagesRequest, contents
from magma_jax.storage.model_folder import MODEL_FILE, read_model_json

RAW = "raw"
# In a model folder: its default.
TEMPLATE_FILE = "template.jinja"
# Of the quick start's drawings, whose questions and captions it knows.
OPENMOJI, OPENMOJI_TEMPLATE = "openmoji", "qa"
MAX_TEMPLATE_BYTES = 64 * 2**10
# Of what a template writes; far more than a prompt can hold.
MAX_WRITTEN = 4 * 2**20


class TemplateError(ValueError):
    """A template that cannot be read or run; one line."""


class Template(Protocol):
    """From messages to texts and images in the order of the prompt."""

    def __call__(self, messages: Sequence[Message]) -> Items: ...


def raw(messages: Sequence[Message]) -> Items:
    """Contents as they are, one after another.

    An answer is set off by a space before and a line break behind, as between question and answer of a few-shot prompt.
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
    """A template in Jinja.

    Raises:
        TemplateError: not Jinja, or it fails on an image with a question.
    """

    def __init__(self, source: str, name: str):
        self._name = name
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{name}: line {error.lineno}: {error.message}") from None
        sample = Message(role="user", content=[ImagePart(type="image_url", image_url=ImageURL(url=""))])
        try:
            self([sample, Message(role="assistant", content="a"), Message(role="user", content="a?")])
        except RequestError as error:
            raise TemplateError(f"{name}: {error}") from None

    def __call__(self, messages: Sequence[Message]) -> Items:
        # Nobody else can write it, so no text of a client stands for an image.
        mark = f"\ufffc{secrets.token_hex(8)}:"
        images: list[ImageURL] = []
        seen = [_shown(message, mark, images) for message in messages]
        written, size = [], 0
        try:
            for piece in self._template.generate(messages=seen, **_ALSO_GIVEN):
                written.append(piece)
                size += len(piece)
                if size > MAX_WRITTEN:
                    raise RequestError(f"the template writes more than {MAX_WRITTEN} characters")
        except RequestError:
            raise
        except Exception as error:  # a template can do anything that Python can do wrong
            raise RequestError(f"the server's template cannot take these messages ({error!s:.200})") from None
        # Texts and numbers of images in turns.
        parts = re.split(f"{mark}(\\d+)\ufffc", "".join(written))
        missing = set(range(len(images))) - {int(number) for number in parts[1::2]}
        if missing:
            raise RequestError(f"the server's template leaves out image {min(missing) + 1} of {len(images)}")
        items = [images[int(part)] if i % 2 else part for i, part in enumerate(parts)]
        return [item for item in items if item != ""]


@dataclasses.dataclass(frozen=True)
class Templates:
    """The templates of a server: those that come with it, and its own.

    Attributes:
        default: name of the one for requests that name none.
        own: further ones by name.
    """

    default: str = RAW
    own: Mapping[str, Template] = dataclasses.field(default_factory=dict)

    def items(self, wanted: MessagesRequest) -> Items:
        """Texts and images of a request in the order of the prompt.

        Raises:
            RequestError: no such template, or it cannot take the messages.
        """
        return self._named(wanted.template or self.default)(wanted.messages)

    def is_raw(self, wanted: MessagesRequest) -> bool:
        """Whether the answer continues what the client wrote."""
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
    """The templates of a server of ``checkpoint``; ``wanted`` is a name or a file.

    Without it the default is the checkpoint's ``template.jinja``, ``qa`` for a run on the quick start's drawings, and
    ``raw`` for all else.

    Raises:
        TemplateError: no such template, or one that cannot be used.
    """
    if wanted in (RAW, *shipped()):
        return Templates(wanted)
    file = Path(checkpoint) / TEMPLATE_FILE if wanted is None else Path(wanted)
    if file.is_file():
        return Templates(file.name, {file.name: _read_template(file)})
    if wanted is not None:
        raise TemplateError(f"{wanted}: neither a file nor one of {', '.join([RAW, *shipped()])}")
    if (Path(checkpoint) / MODEL_FILE).is_file():
        run = read_model_json(checkpoint).get("run")
        data = run.get("data") if isinstance(run, dict) else None
        # Runs of release 0.1 call it name.
        if isinstance(data, dict) and OPENMOJI in (data.get("kind"), data.get("name")):
            return Templates(OPENMOJI_TEMPLATE)
    return Templates()


@functools.cache
def shipped() -> tuple[str, ...]:
    """Names of the templates that come with the server, besides ``raw``."""
    files = (resources.files("magma_jax.serve.prompts") / "templates").iterdir()
    return tuple(sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja")))


@functools.cache
def shipped_template(name: str) -> Template:
    """One of them."""
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


# What templates written for transformers look for besides messages.
_ALSO_GIVEN = {"add_generation_prompt": True, "tools": None, "documents": None, "bos_token": "", "eos_token": ""}


def _shown(message: Message, mark: str, images: list[ImageURL]) -> dict[str, Any]:
    """A message as a template sees it; its images are added to ``images``."""
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
    # As transformers runs the templates of models: no attribute of Python's own, no changing of what is passed in,
    # bounded ranges, and nothing global but what is listed.
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], undefined=jinja2.StrictUndefined
    )
    made.globals = {"range": made.globals["range"], "namespace": _Namespace, "raise_exception": _raise}
    made.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    made.filters["question"] = bare_question
    made.tests["worded"] = is_worded
    made.tests["caption_request"] = asks_for_caption
    return made


class _Namespace(jinja2.utils.Namespace):
    """Jinja's own takes names such as ``__class__``."""

    def __init__(*arguments: Any, **attributes: Any):
        for name in dict(*arguments[1:], **attributes):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*arguments, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"namespace: {name!r} is no name, or begins with an underscore")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)

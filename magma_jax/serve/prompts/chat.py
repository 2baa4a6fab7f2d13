"""Chat templates of published language models, rendered as transformers renders them.

A template gets ``messages`` of ``role`` and ``content``, the names of special tokens such as ``bos_token``, and
``add_generation_prompt``. Images stand in the content where the client put them. Most templates take contents that are
texts; those that take lists of parts print a token of their own for an image, which the image replaces.
"""

import datetime
import functools
import secrets
from collections.abc import Sequence
from typing import Any

import jinja2

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.prompts import ChatText
from magma_jax.serve.errors import RequestError
from magma_jax.serve.prompts.sandbox import TemplateError, compiled, rendered, sandbox
from magma_jax.serve.requests.schema import ImageURL, Items, Message, contents

# OpenAI's newer name of a role that published templates know.
_ROLES = {"developer": "system"}


class ChatTemplate:
    """Chat template of a tokenizer.

    Special tokens that a message spells are no tokens, see ``Tokenizer.spell_out``.

    Raises:
        TemplateError: not Jinja, or it fails on a message of a user.
    """

    def __init__(self, tokenizer: Tokenizer, name: str = "chat"):
        self._names, self._spell_out = tokenizer.settings.special, tokenizer.spell_out
        self._template = compiled(_environment(), tokenizer.settings.chat_template or "", name)
        mark = _mark()
        try:
            self._lists = mark not in self._render([{"role": "user", "content": mark}])
        except RequestError:
            self._lists = True
        # What a template of lists prints for an image; the first character of the mark is nowhere else.
        self._image = ""
        if not self._lists:
            return
        text, image = {"type": "text", "text": mark}, {"type": "image"}
        try:
            plain, shown = (self._render([{"role": "user", "content": parts}]) for parts in ([text], [image, text]))
        except RequestError as error:
            raise TemplateError(f"{name}: {error}") from None
        if mark not in plain:
            raise TemplateError(f"{name}: the chat template leaves out what a user says")
        start = next((i for i, (a, b) in enumerate(zip(plain, shown, strict=False)) if a != b), len(plain))
        self._image = shown[start : start + len(shown) - len(plain)]

    def __call__(self, messages: Sequence[Message]) -> Items:
        images: list[ImageURL] = []
        mark = _mark()
        seen = [
            {
                "role": _ROLES.get(message.role, message.role),
                "content": (self._parts if self._lists else self._text)(message, images, mark),
            }
            for message in messages
        ]
        written = self._render(seen)
        # Texts and images alternate.
        pieces = self._cut(written, mark)
        if len(pieces) != len(images) + 1:
            raise RequestError(
                f"the model's chat template shows {len(pieces) - 1} images of {len(images)}; change the messages"
            )
        items: Items = [ChatText(pieces[0])]
        for image, piece in zip(images, pieces[1:], strict=True):
            items += [image, ChatText(piece)]
        return [item for item in items if item != ""]

    def _text(self, message: Message, images: list[ImageURL], mark: str) -> str:
        """The content as a text in which ``mark`` stands for an image."""
        written, behind_text = [], False
        for item in contents(message.parts):
            if isinstance(item, ImageURL):
                images.append(item)
                written.append(mark)
            else:
                written.append(("\n" if behind_text else "") + self._spell_out(item))
            behind_text = isinstance(item, str)
        return "".join(written)

    def _parts(self, message: Message, images: list[ImageURL], mark: str) -> list[dict[str, str]]:
        parts = []
        for item in contents(message.parts):
            if isinstance(item, ImageURL):
                images.append(item)
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": self._without_image_token(self._spell_out(item))})
        return parts

    def _without_image_token(self, text: str) -> str:
        token = self._image.strip()
        return text.replace(token, f"{token[0]}\u200b{token[1:]}") if token else text

    def _cut(self, written: str, mark: str) -> list[str]:
        if not self._lists:
            return written.split(mark)
        return written.split(self._image) if self._image else [written]

    def _render(self, messages: list[dict[str, Any]]) -> str:
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return rendered(self._template, "the model's chat template", variables | self._names)


def _mark() -> str:
    # Secret, so that no client's text can imitate an image.
    return f"\ufffc{secrets.token_hex(8)}\ufffc"


@functools.cache
def _environment() -> jinja2.Environment:
    made = sandbox(jinja2.Undefined)
    made.globals |= {"strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    return made

"""OpenAI request schemas, and their conversion to engine options."""

# Field types are created by calls, which pydantic supports and type checkers do not.
# pyright: reportInvalidTypeForm=false

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from magma_jax.inference.batching.requests import MAX_TOP_LOGPROBS, RequestOptions
from magma_jax.inference.decoding.config import SEED_BITS, SamplingConfig
from magma_jax.inference.structured.grammars import Grammar
from magma_jax.serve.errors import RequestError
from magma_jax.serve.requests.structured import StructuredFields
from magma_jax.serve.requests.unserved import Name, Strict, UnservedOfAnswers, UnservedOfChat, unserved

MAX_STOPS = 8
# Limit on a stop text in characters; every burst of tokens is searched for it.
MAX_STOP_LENGTH = 256
# Maximum number of answers to one request.
MAX_CHOICES = 8
# Far above what a prompt can hold; bounds the work before images are counted.
MAX_MESSAGES = 2_000
MAX_PARTS = 20_000
MAX_TOKENS = 100_000
# Maximum number of fields of an object; every unknown field produces an error.
MAX_FIELDS = 1_000
# Maximum length of quotes in error messages.
MAX_QUOTED = 200
# Every list and string has a limit, and validation of a list stops at its first error, since each error takes a
# kilobyte of objects. Prompt texts and image URLs are limited by the body size; the model takes far less.

# Default maximum of tokens: for chat, and OpenAI's for text completions.
CHAT_TOKENS, TEXT_TOKENS = 64, 16

# Union fields and the tags of their members, which pydantic adds to error locations.
_UNIONS = frozenset({"content", "prompt", "response_format", "stop", "answer"})
_TAGS = frozenset({"text", "texts", "tokens", "token lists", "parts", "image_url", "json_object", "json_schema"})

Asked = TypeVar("Asked", bound=Strict)


class TextPart(Strict):
    """Text inside a message."""

    type: Literal["text"]
    text: str
    # Accepted without effect, since prompts are always cached.
    prompt_cache_breakpoint: dict[str, Any] | None = None


class ImageURL(Strict):
    """URL of an image; ``detail`` is accepted and ignored, since there is one resolution."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Strict):
    """An image inside a message."""

    type: Literal["image_url"]
    image_url: ImageURL
    prompt_cache_breakpoint: dict[str, Any] | None = None


# Texts and images in prompt order.
Items = list[str | ImageURL]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]


def _speaker(role: Any) -> Any:
    if role in ("tool", "function"):
        raise ValueError("not supported: the model calls no functions")
    return role


class Message(Strict):
    """One message; contents may mix images and text in any order.

    Complete SDK answers are accepted as history: their other fields are empty or repeat the content (``parsed``).
    """

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_speaker)]
    content: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")],
            Discriminator(lambda content: "text" if isinstance(content, str) else "parts"),
        ]
        | None
    ) = None
    name: Name | None = None
    refusal: unserved("put it into content", "") = None
    audio: unserved("the model reads text and images") = None
    annotations: unserved("the model reads text and images", []) = None
    function_call: unserved("the model calls no functions") = None
    tool_calls: unserved("the model calls no functions", []) = None
    reasoning_content: unserved("the model does not reason", "") = None
    provider_specific_fields: dict[str, Any] | None = None
    parsed: Any = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        if self.role == "assistant" and any(isinstance(part, ImagePart) for part in self.parts):
            raise ValueError("an assistant's message holds text alone")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Texts and images in order; an assistant message without content is an empty answer."""
        if isinstance(self.content, list):
            return self.content
        return [TextPart(type="text", text=self.content or "")]


class StreamOptions(Strict):
    """Token usage in stream events: in the last one, or in all (vLLM's ``continuous_usage_stats``)."""

    model_config = ConfigDict(frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: unserved("chunks are sent as they are", False) = None


class PromptRequest(Strict):
    """Common fields of requests with a prompt."""

    model: Name | None = None
    cache_salt: Name | None = None


class MessagesRequest(PromptRequest):
    """Prompt of messages; ``template`` names their chat template, see ``serve.prompts.templates``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    template: Name | None = None


Number = Annotated[int, Field(ge=1, lt=2**63)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[
    Annotated[StopText, Tag("text")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("texts")],
    Discriminator(lambda stop: "text" if isinstance(stop, str) else "texts"),
]


class SamplingRequest(UnservedOfAnswers, StructuredFields):
    """Sampling and output fields of chat and text completions.

    ``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``, ``ignore_eos`` and ``return_token_ids`` are extensions
    with vLLM's names.
    """

    max_tokens: Number | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**63)] = 0
    ignore_eos: bool = False
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False

    @field_validator("temperature", "top_p", "min_p", "repetition_penalty", mode="before")
    @classmethod
    def _whole_numbers_are_numbers(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if whole and abs(value) < 2**63 else value  # larger ones may overflow a float

    @property
    def default_tokens(self) -> int:
        """Default maximum of tokens."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int:
        """Number of most likely tokens to report for each token."""
        raise NotImplementedError

    def options(self, left: int, *, cut: bool, grammar: Grammar | None = None) -> list[RequestOptions]:
        """Engine options of each of the ``n`` choices, with seeds ``seed``, ``seed + 1``, ..., or random seeds.

        Args:
            left: positions left in the context after the prompt.
            cut: reduce ``max_tokens`` to ``left``.
            grammar: constraint on the answers.
        """
        wanted, least = self.limit or max(1, self.min_tokens, min(self.default_tokens, left)), self.min_tokens
        if least > wanted:
            raise RequestError(f"min_tokens {least} is more than max_tokens {wanted}", param="min_tokens")
        if cut:
            wanted = min(wanted, max(left, 1))
        least = wanted if self.ignore_eos else min(least, wanted)
        top_k = max(self.top_k, 0)  # -1 is vLLM's value for all
        sampling = SamplingConfig(self.temperature, top_k, self.top_p, self.min_p, self.repetition_penalty)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbits(SEED_BITS) if self.seed is None else self.seed
        return [
            RequestOptions(wanted, sampling, (seed + i) % 2**SEED_BITS, stop, self.alternatives, least, grammar)
            for i in range(self.n)
        ]

    @property
    def limit(self) -> int | None:
        """The request's maximum of tokens; None if not set."""
        return self.max_tokens


class ChatRequest(MessagesRequest, SamplingRequest, UnservedOfChat):
    """Body of ``POST /v1/chat/completions``."""

    max_completion_tokens: Number | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0

    @model_validator(mode="after")
    def _logprobs_for_alternatives(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def default_tokens(self) -> int:
        return CHAT_TOKENS

    @property
    def alternatives(self) -> int:
        return self.top_logprobs


def _kind_of_prompt(prompt: Any) -> str:
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    if isinstance(prompt, list):
        return {str: "texts", int: "tokens", list: "token lists"}.get(type(first), "parts")
    return "text"


Tokens = Annotated[list[Token], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Several = Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)


class TextRequest(PromptRequest, SamplingRequest):
    """Body of ``POST /v1/completions``.

    The prompt is one or several texts, or token ids, or, as an extension, parts as in a message's content. ``logprobs``
    is the number of alternatives to each token.
    """

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Several, Tag("texts")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[list[Tokens], Several, Tag("token lists")]
        | Annotated[Parts, Tag("parts")],
        Discriminator(_kind_of_prompt),
    ]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: unserved("the model continues text", "") = None

    @model_validator(mode="after")
    def _possible(self) -> "TextRequest":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: they are those of the answer")
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts with n = {self.n} are more than {MAX_CHOICES} answers")
        return self

    @property
    def prompts(self) -> list[Items | list[int]]:
        """The prompts, each as texts and images in order or as token ids."""
        prompt: Any = self.prompt  # its type depends on the tag
        match _kind_of_prompt(prompt):
            case "text":
                return [[prompt]]
            case "texts":
                return [[text] for text in prompt]
            case "tokens":
                return [prompt]
            case "token lists":
                return prompt
        return [contents(prompt)]

    @property
    def default_tokens(self) -> int:
        return TEXT_TOKENS

    @property
    def alternatives(self) -> int:
        return self.logprobs or 0


def contents(parts: list[TextPart | ImagePart]) -> Items:
    """Texts and image URLs of a message's parts."""
    return [part.text if isinstance(part, TextPart) else part.image_url for part in parts]


def parse(content: Any, kind: type[Asked]) -> Asked:
    """Validates a parsed body.

    Raises:
        RequestError: names the first error.
    """
    _check_fields(content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where, words = _where(first["loc"][:8])[:MAX_QUOTED], _words(first)[:MAX_QUOTED]
        raise RequestError(f"{where}: {words}" if where else words, param=where or None) from None


def _where(places: Sequence[str | int]) -> str:
    """Path of a value, without the union tags, which follow a list index or a union field."""
    named, before = [], None
    for place in places:
        if not (place in _TAGS and (isinstance(before, int) or before in _UNIONS)):
            named.append(place)
        before = place
    return ".".join(map(str, named))


def _words(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "no field that this server knows"
    if error["type"] == "union_tag_invalid":
        return f"{error['ctx']['tag']!r:.40} is not supported; {error['ctx']['expected_tags']} are"
    return error["msg"].removeprefix("Value error, ")


def _check_fields(content: Any) -> None:
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if len(value) > MAX_FIELDS:
                raise RequestError(f"the request has an object of {len(value)} fields, at most {MAX_FIELDS} are taken")
            value = value.values()
        elif not isinstance(value, list):
            continue
        waiting += [inner for inner in value if isinstance(inner, dict | list)]


def finite(constant: str) -> Any:
    """For ``json.loads(parse_constant=...)``: rejects NaN and Infinity, which are not JSON."""
    raise ValueError(f"{constant} is not a number of JSON")

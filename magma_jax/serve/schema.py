"""The OpenAI chat-completions shape: what a request may hold, and how it becomes a prompt."""

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from magma_jax.inference.requests import MAX_TOP_LOGPROBS, RequestOptions
from magma_jax.inference.sampling import SEED_BITS, SamplingConfig
from magma_jax.serve.errors import RequestError

MAX_STOPS = 8
# Characters of a stop text: every burst of tokens is searched for all of it.
MAX_STOP_LENGTH = 256
MAX_CHOICES = 8
# Far above what a prompt can hold; so much is looked through before the pictures among it are counted.
MAX_MESSAGES = 2_000
MAX_PARTS = 20_000
# Fields of one object: each that nobody knows makes an error of its own.
MAX_FIELDS = 1_000
# Of what an error quotes.
MAX_QUOTED = 200

# Every list and string has a bound, and a list ends at its first error: each error is a kilobyte of objects. The texts
# of a prompt and the URLs of its pictures have that of the body; what the model takes is far less.
Name = Annotated[str, Field(max_length=512)]

Asked = TypeVar("Asked", bound="PromptRequest")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """Text inside a message."""

    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    """Where a picture is; ``detail`` is taken and ignored: there is one resolution."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """A picture inside a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn; contents may mix pictures and text in any order."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True), Tag("parts")],
        Discriminator(lambda content: "text" if isinstance(content, str) else "parts"),
    ]
    name: Name | None = None


class StreamOptions(_Strict):
    """Whether the last chunk of a stream counts tokens."""

    include_usage: bool = False


class PromptRequest(_Strict):
    """What every request with a prompt has."""

    model: Name | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    cache_salt: Name | None = None

    def items(self) -> list[str | ImageURL]:
        """Texts and pictures in the order of the prompt.

        MAGMA continues text and knows no roles: contents follow each other as they are, except that an answer is set
        off by a space before and a line break behind, as between question and answer of a few-shot prompt.
        """
        items: list[str | ImageURL] = []
        for i, message in enumerate(self.messages):
            parts = (
                [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
            )
            if message.role == "assistant":
                text = "".join(part.text for part in parts if isinstance(part, TextPart)).strip()
                if any(isinstance(part, ImagePart) for part in parts):
                    raise RequestError("an assistant's message holds text alone", param=f"messages.{i}.content")
                items.append(f" {text}" + ("\n" if i + 1 < len(self.messages) else ""))
                continue
            items += [part.text if isinstance(part, TextPart) else part.image_url for part in parts]
        return [item for item in items if item != ""]


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[
    Annotated[StopText, Tag("text")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("texts")],
    Discriminator(lambda stop: "text" if isinstance(stop, str) else "texts"),
]


class ChatRequest(PromptRequest):
    """Body of ``POST /v1/chat/completions``.

    ``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``, ``cache_salt`` and ``return_token_ids`` are additions
    to the standard, named as by vLLM.
    """

    max_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**63)] = 0
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    return_token_ids: bool = False
    user: Name | None = None

    # Named by the standard and not served: refused unless they ask for nothing.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    @field_validator("temperature", "top_p", "min_p", "repetition_penalty", mode="before")
    @classmethod
    def _whole_numbers_are_numbers(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if whole and abs(value) < 2**63 else value  # larger ones may be no float

    @model_validator(mode="after")
    def _unsupported(self) -> "ChatRequest":
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported; repetition_penalty is")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    def options(self, default_tokens: int) -> list[RequestOptions]:
        """One set of options for each of the ``n`` choices, of seeds ``seed``, ``seed + 1``, ...; random if none."""
        sampling = SamplingConfig(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        wanted = self.max_completion_tokens or self.max_tokens or max(default_tokens, self.min_tokens)
        if self.min_tokens > wanted:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {wanted}", param="min_tokens")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbits(SEED_BITS) if self.seed is None else self.seed
        return [
            RequestOptions(wanted, sampling, (seed + i) % 2**SEED_BITS, stop, self.top_logprobs, self.min_tokens)
            for i in range(self.n)
        ]


def parse(content: Any, kind: type[Asked]) -> Asked:
    """Checks a decoded body.

    Raises:
        RequestError: with the first thing that is wrong.
    """
    _check_fields(content)
    if isinstance(content, dict):
        # Clients send null for what they do not set.
        content = {key: value for key, value in content.items() if value is not None}
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:6])[:MAX_QUOTED]
        message = first["msg"].removeprefix("Value error, ")[:MAX_QUOTED]
        raise RequestError(f"{where}: {message}" if where else message, param=where or None) from None


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
    """For ``json.loads(parse_constant=...)``: NaN and Infinity are no JSON."""
    raise ValueError(f"{constant} is not a number of JSON")

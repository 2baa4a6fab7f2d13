"""Request schemas of the image routes, OpenAI's with some extensions, and their conversion to ``ImageOptions``."""

# Field types are created by calls, which pydantic supports and type checkers do not.
# pyright: reportInvalidTypeForm=false

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from magma_jax.inference.answers import ImageOptions
from magma_jax.inference.decoding.config import SEED_BITS
from magma_jax.inference.decoding.guidance import MAX_K
from magma_jax.serve.errors import RequestError
from magma_jax.serve.requests.schema import MAX_CHOICES
from magma_jax.serve.requests.unserved import Name, Strict, unserved

# Characters; far more than a prompt of any model here.
MAX_PROMPT = 8_000
# Maximum number of partial images, as in OpenAI's API.
MAX_PARTIAL = 3

OutputFormat = Literal["png", "jpeg", "webp"]
_STILL = "images are still and of pixels"


class ImageRequest(Strict):
    """Body of ``POST /v1/images/generations``.

    ``seed``, ``steps``, ``guidance``, ``temperature``, ``candidates``, ``cd_k`` and ``contrasted`` are extensions; see
    ``ImageOptions``.
    """

    model: Name | None = None
    prompt: Annotated[str, Field(max_length=MAX_PROMPT)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    size: Annotated[str, Field(max_length=32)] = "auto"
    response_format: unserved("an image comes as b64_json", "b64_json") = None
    output_format: OutputFormat = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    steps: Annotated[int, Field(ge=1, le=1_000)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] = 1.0
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    candidates: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    cd_k: Annotated[int, Field(ge=0, le=MAX_K)] = 0
    contrasted: Annotated[int, Field(ge=0, le=MAX_CHOICES)] | None = None

    quality: unserved("there is one quality", "auto", "standard") = None
    background: unserved("images are opaque", "auto", "opaque") = None
    style: unserved("describe it in the prompt") = None
    svg: unserved(_STILL) = None
    complexity: unserved(_STILL) = None
    frame_count: unserved(_STILL, 1) = None
    frame_duration_ms: unserved(_STILL) = None

    # Accepted without effect on the image.
    moderation: Literal["low", "auto"] | None = None
    user: Name | None = None
    safety_identifier: Name | None = None

    @field_validator("guidance", "temperature", mode="before")
    @classmethod
    def _whole_numbers_are_numbers(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if whole and abs(value) < 2**63 else value

    def check_size(self, size: int) -> None:
        """Raises RequestError unless the wanted size is that of the model's images, ``size`` pixels a side."""
        if self.size not in ("auto", f"{size}x{size}"):
            raise RequestError(f"size {self.size!r}: this model's images are {size}x{size}", param="size")

    def options(self) -> ImageOptions:
        """Options of the images, with the request's seed or a random one."""
        seed = secrets.randbits(SEED_BITS - 1) if self.seed is None else self.seed
        return ImageOptions(
            n=self.n,
            seed=seed,
            candidates=self.candidates,
            guidance=self.guidance,
            temperature=None if self.temperature is None else (self.temperature, self.temperature),
            steps=self.steps,
            cd_k=self.cd_k,
            contrasted=self.contrasted,
        )


class EditRequest(ImageRequest):
    """Fields of ``POST /v1/images/edits`` without its files."""

    input_fidelity: unserved("what the mask does not mark is kept") = None


# What a text of a form stands for, by the field's type in JSON.
_TRUTHS = {"true": True, "false": False}
_WHOLE = re.compile(r"-?\d{1,20}")


def fields_of_form(fields: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Texts of a form as JSON values, by the types of ``EditRequest``.

    Raises:
        RequestError: a field that comes twice, or a text that is no value of its field.
    """
    found: dict[str, Any] = {}
    for name, texts in fields.items():
        if len(texts) != 1:
            raise RequestError(f"{name:.40}: comes {len(texts)} times", param=name[:40])
        found[name] = _value(name, texts[0])
    return found


def _value(name: str, text: str) -> Any:
    field = EditRequest.model_fields.get(name)
    types = set() if field is None else {field.annotation, *get_args(field.annotation)}
    if bool in types:
        if text not in _TRUTHS:
            raise RequestError(f"{name}: true or false, not {text!r:.40}", param=name)
        return _TRUTHS[text]
    if _is_number(types):
        try:
            return int(text) if _WHOLE.fullmatch(text) else float(text)
        except ValueError:
            raise RequestError(f"{name}: a number, not {text!r:.40}", param=name) from None
    return text


def _is_number(types: set[Any]) -> bool:
    inner = {part for kind in types for part in (kind, *get_args(kind))}
    return bool({int, float} & inner)

"""Unsupported request fields: values without effect are accepted, all others are refused.

The names are those of the OpenAI SDKs' request types and of vLLM's extensions.
"""

# Field types are created by calls, which pydantic supports and type checkers do not.
# pyright: reportInvalidTypeForm=false

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# A text that is accepted and ignored.
Name = Annotated[str, Field(max_length=512)]

_NO_FUNCTIONS = "the model calls no functions"
_TEXT_ALONE = "the model writes text alone"
_NOT_KEPT = "requests are not kept"
_SAMPLING = "temperature, top_k, top_p, min_p and repetition_penalty are"


class Strict(BaseModel):
    """Model that accepts only known fields of the right types; null means that a field is not set."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {name: value for name, value in content.items() if value is not None}


def unserved(reason: str, *nothing: Any) -> Any:
    """Type of a field that is refused with ``reason``, unless its value is one of ``nothing``."""

    def check(value: Any) -> None:
        if isinstance(value, dict):
            value = {name: inner for name, inner in value.items() if inner is not None}
        # 0 equals False in Python, but not in JSON.
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in nothing):
            raise ValueError(f"not supported: {reason}")

    return Annotated[Any, BeforeValidator(check)]


def _no_bias(value: Any) -> None:
    if not isinstance(value, dict) or any(value.values()):
        raise ValueError(f"not supported; {_SAMPLING}")


class UnservedOfAnswers(Strict):
    """Unsupported fields of chat and text completions."""

    frequency_penalty: unserved("repetition_penalty is", 0) = None
    presence_penalty: unserved("repetition_penalty is", 0) = None
    logit_bias: Annotated[Any, BeforeValidator(_no_bias)] = None
    best_of: unserved("n is", 1) = None
    use_beam_search: unserved("magma_jax.generate searches by beams", False) = None
    length_penalty: unserved("there is no beam search", 1) = None
    stop_token_ids: unserved("stop is", []) = None
    include_stop_str_in_output: unserved("a stop text is no part of the answer", False) = None
    bad_words: unserved(_SAMPLING, []) = None
    allowed_token_ids: unserved(_SAMPLING) = None
    logits_processors: unserved(_SAMPLING, []) = None
    prompt_logprobs: unserved("logprobs are those of the answer") = None
    skip_special_tokens: unserved("special tokens are never shown", True) = None
    spaces_between_special_tokens: unserved("special tokens are never shown", True, False) = None
    truncate_prompt_tokens: unserved("prompts are not cut", -1) = None
    return_tokens_as_token_ids: unserved("return_token_ids is", False) = None
    priority: unserved("first come, first served", 0) = None
    vllm_xargs: unserved("there are none", {}) = None

    # Accepted without effect on the answer.
    user: Name | None = None
    request_id: Name | None = None


class UnservedOfChat(UnservedOfAnswers):
    """Unsupported fields of chat completions."""

    tools: unserved(_NO_FUNCTIONS, []) = None
    tool_choice: unserved(_NO_FUNCTIONS, "none", "auto") = None
    functions: unserved(_NO_FUNCTIONS, []) = None
    function_call: unserved(_NO_FUNCTIONS, "none", "auto") = None
    modalities: unserved(_TEXT_ALONE, ["text"], []) = None
    audio: unserved(_TEXT_ALONE) = None
    prediction: unserved("every token is sampled") = None
    reasoning_effort: unserved("the model does not reason", "none") = None
    verbosity: unserved("max_tokens limits an answer", "medium") = None
    web_search_options: unserved("nothing is looked up") = None
    moderation: unserved("nothing is moderated") = None
    store: unserved(_NOT_KEPT, False) = None
    service_tier: unserved("there is one", "auto", "default") = None
    prompt_cache_options: unserved("prompts are cached by themselves", {}, {"mode": "implicit"}) = None
    documents: unserved("put the text into a message", []) = None
    chat_template: unserved("template names one of the server's") = None
    chat_template_kwargs: unserved("templates take none", {}, {"enable_thinking": False}) = None
    mm_processor_kwargs: unserved("images are prepared in one way", {}) = None
    media_io_kwargs: unserved("images are read in one way", {}) = None
    add_generation_prompt: unserved("an answer is always begun", True) = None
    continue_final_message: unserved("an assistant's last message is always continued", False, True) = None
    add_special_tokens: unserved("the model's prompts have none", False) = None
    echo: unserved("/v1/completions has it", False) = None

    # Accepted without effect on the answer.
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Name | None = None

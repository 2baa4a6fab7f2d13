"""What requests may hold: fields that ask for nothing, null, whole answers as history, and words for refusals."""

import pytest

from magma_jax.serve.errors import RequestError
from magma_jax.serve.requests.schema import ChatRequest, TextRequest, parse

USER = {"role": "user", "content": "a"}
# The fields of a request in the two OpenAI SDKs (Python 3.57, JavaScript 6.49).
OF_CHATS = [
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "metadata",
    "modalities",
    "model",
    "moderation",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
]
OF_TEXTS = [
    "best_of",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "model",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_p",
    "user",
]
NOTHING = [
    ("response_format", {"type": "text"}),
    ("tools", []),
    ("functions", []),
    ("tool_choice", "none"),
    ("tool_choice", "auto"),
    ("function_call", "none"),
    ("logit_bias", {}),
    ("logit_bias", {"17": 0}),
    ("store", False),
    ("parallel_tool_calls", True),
    ("modalities", ["text"]),
    ("service_tier", "auto"),
    ("metadata", {"a": "b"}),
    ("verbosity", "medium"),
    ("reasoning_effort", "none"),
    ("prompt_cache_key", "a"),
    ("prompt_cache_options", {"mode": "implicit", "ttl": None}),
    ("safety_identifier", "a"),
    ("top_k", -1),
    ("frequency_penalty", 0),
    ("presence_penalty", 0.0),
    ("stream_options", {"include_usage": None, "include_obfuscation": False}),
    # vLLM's
    ("best_of", 1),
    ("use_beam_search", False),
    ("length_penalty", 1.0),
    ("skip_special_tokens", True),
    ("stop_token_ids", []),
    ("add_generation_prompt", True),
    ("chat_template_kwargs", {"enable_thinking": False}),
]
SOMETHING = [
    ("response_format", {"type": "nonsense"}),
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "required"),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("logit_bias", {"17": 5}),
    ("store", True),
    ("store", 0),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("prediction", {"type": "content", "content": "a"}),
    ("service_tier", "flex"),
    ("verbosity", "high"),
    ("reasoning_effort", "low"),
    ("web_search_options", {}),
    ("moderation", {"model": "m"}),
    ("frequency_penalty", 0.5),
    ("presence_penalty", -1),
    ("best_of", 2),
    ("chat_template", "{{ messages }}"),
]


def chat(**fields):
    return parse({"messages": [USER], **fields}, ChatRequest)


def said(kind=ChatRequest, **fields):
    with pytest.raises(RequestError) as caught:
        parse({"messages": [USER], **fields} if kind is ChatRequest else fields, kind)
    return caught.value


@pytest.mark.parametrize(("name", "value"), NOTHING)
def test_a_field_that_asks_for_nothing_is_taken(name, value):
    assert chat(seed=1, **{name: value}).options(50, cut=False) == chat(seed=1).options(50, cut=False)


@pytest.mark.parametrize(("name", "value"), SOMETHING)
def test_a_field_that_asks_for_something_says_so_by_its_name(name, value):
    error = said(**{name: value})
    assert error.param.split(".")[0] == name
    assert str(error).startswith(name)
    assert "supported" in str(error)


@pytest.mark.parametrize(("kind", "names"), [(ChatRequest, OF_CHATS), (TextRequest, OF_TEXTS)])
def test_null_is_not_set_and_no_field_of_the_sdks_is_unknown(kind, names):
    prompt = {"messages": [USER]} if kind is ChatRequest else {"prompt": "a"}
    parse({**prompt, **dict.fromkeys(names)}, kind)
    assert set(names) <= kind.model_fields.keys()


def test_null_is_not_set_at_every_depth():
    image = {"url": "data:", "detail": None}
    parts = [
        {"type": "image_url", "image_url": image},
        {"type": "text", "text": "a", "prompt_cache_breakpoint": None},
    ]
    messages = [{"role": "user", "content": parts, "name": None}]
    chat(messages=messages, stream_options={"include_usage": None}, response_format={"type": "text", "extra": None})
    form = {"name": "a", "description": None, "schema": {}, "strict": None}
    assert chat(response_format={"type": "json_schema", "json_schema": form}, guided_json=None).forms == [
        "response_format"
    ]


@pytest.mark.parametrize(
    "answer",
    [
        # model_dump() of the Python SDK's message, of its parsed one, of LiteLLM's, and what the JavaScript SDK holds.
        {"content": "b", "refusal": None, "role": "assistant", "annotations": None, "audio": None, "tool_calls": None},
        {"content": "b", "role": "assistant", "function_call": None, "tool_calls": [], "parsed": {"a": [1]}},
        {"content": "b", "role": "assistant", "provider_specific_fields": {"refusal": None}, "annotations": []},
        {"content": "b", "role": "assistant", "refusal": None},
        {"content": [{"type": "text", "text": "b"}], "role": "assistant", "name": "x", "reasoning_content": ""},
        {"content": None, "role": "assistant"},
        {"role": "assistant"},
    ],
)
def test_answers_go_back_in_as_history(answer):
    assert chat(messages=[USER, answer, USER]).messages[1].role == "assistant"


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, "messages.1.role", "not supported: the model calls no"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages.1.tool_calls", "not supported"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "messages.1.refusal", "not supported"),
        ({"role": "user", "content": None}, "messages.1", "content is missing"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.1.content.0.text", "Field required"),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            "messages.1.content.0",
            "'input_audio' is not supported; 'text', 'image_url' are",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]},
            "messages.1.content.0.image_url.url",
            "valid string",
        ),
    ],
)
def test_places_of_errors_are_those_of_the_request(message, param, says):
    error = said(messages=[USER, message])
    assert error.param == param
    assert says in str(error)


def test_an_unknown_field_is_named():
    assert (said(tool=[]).param, str(said(tool=[]))) == ("tool", "tool: no field that this server knows")


def test_tokens_of_an_answer():
    def of(left=50, *, cut=False, **fields):
        (options,) = chat(**fields).options(left, cut=cut)
        return options.max_new_tokens, options.min_new_tokens

    assert of() == (50, 0)
    assert of(left=500) == (64, 0)
    assert of(max_tokens=7, max_completion_tokens=9) == (9, 0)
    assert of(max_tokens=7, ignore_eos=True) == (7, 7)
    assert of(max_tokens=70) == (70, 0)  # the engine refuses it
    assert of(max_tokens=70, cut=True) == (50, 0)
    assert of(max_tokens=70, min_tokens=60, cut=True) == (50, 50)
    assert of(max_tokens=70, left=-3, cut=True) == (1, 0)
    with pytest.raises(RequestError, match="min_tokens 9 is more than max_tokens 3"):
        of(max_tokens=3, min_tokens=9)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", [["a"]]),
        (["a", "b"], [["a"], ["b"]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6]], [[5], [6]]),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], [["a", "b"]]),
    ],
)
def test_prompts_of_texts(prompt, prompts):
    assert parse({"prompt": prompt}, TextRequest).prompts == prompts


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": []}, "prompt: List should have at least 1 item"),
        ({"prompt": ["a", 1]}, "prompt.1: "),
        ({"prompt": [-1]}, "prompt.0: "),
        ({"prompt": [[]]}, "prompt.0: "),
        ({"prompt": "a", "suffix": "b"}, "suffix: not supported"),
        ({"prompt": "a", "echo": True, "logprobs": 0}, "echo with logprobs is not supported"),
        ({"prompt": ["a", "b"], "n": 5}, "2 prompts with n = 5 are more than 8 answers"),
    ],
)
def test_texts_that_cannot_be_continued(fields, says):
    assert says in str(said(TextRequest, **fields))

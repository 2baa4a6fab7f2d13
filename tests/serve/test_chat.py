"""Chat templates of published models: what transformers renders, with images in place."""

import pytest
from transformers import PreTrainedTokenizerFast

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.prompts import WORD, ChatText, lay_out
from magma_jax.serve.errors import RequestError
from magma_jax.serve.prompts.chat import ChatTemplate
from magma_jax.serve.prompts.sandbox import TemplateError
from magma_jax.serve.prompts.templates import templates_for
from magma_jax.serve.requests.schema import ChatRequest, ImageURL, parse
from tests.data.vocabularies import bytes_alone, pieces, published

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
SEEN = ImageURL(url="x")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' -%}
{{ '<s>system\nYou help.</s>\n' }}{% endif %}{{'<s>' + message['role'] + '\n' + message['content'] + '</s>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}\
{% set system = messages[0]['content'] %}\
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate\nnow') }}{% endif %}{% if loop.index0 == 0 and system != false %}\
{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
DATED = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") if strftime_now is defined else "26" %}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- generation %}
        {{- ns.count ~ date_string ~ message.content | trim ~ (tools | tojson) ~ documents ~ missing }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '</s>' }}{% endif %}
"""
# Takes texts and lists, as Gemma 3's.
BOTH = """{{ bos_token }}{%- for message in messages -%}{{ message['role'] ~ ': ' }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}
{%- endif -%}{%- endfor -%}{%- endif -%}{{ '</s>\n' }}{%- endfor -%}"""
# Takes lists alone and puts images first, as LLaVA's.
LISTS = """{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
TURNS = [("system", "Be brief."), ("user", "  a, b? "), ("assistant", "caf\u00e9"), ("user", "b a")]


def messages(*turns):
    return parse({"messages": [{"role": role, "content": content} for role, content in turns]}, ChatRequest).messages


def template(folder, source, backend=None):
    """The template and its tokenizer, and transformers' tokenizer."""
    published(folder, backend or bytes_alone(), SPECIAL, source, begin="<s>")
    words = Tokenizer.load(folder)
    return ChatTemplate(words), words, PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("vocabulary", ["bytes", "prepend", "metaspace"])
@pytest.mark.parametrize("source", [CHATML, LLAMA2, DATED, BOTH], ids=["chatml", "llama2", "dated", "both"])
def test_texts_and_tokens_equal_transformers(source, vocabulary, tmp_path):
    backend = bytes_alone() if vocabulary == "bytes" else pieces(**{vocabulary: True})
    chat, words, theirs = template(tmp_path, source, backend)
    for turns in (TURNS, TURNS[1:2]):
        (text,) = chat(messages(*turns))
        plain = [{"role": role, "content": content} for role, content in turns]
        assert text == theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        expected = theirs.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
        assert lay_out([text], words, 1).tokens.tolist() == expected


def test_lists_of_parts(tmp_path):
    chat, _, theirs = template(tmp_path, LISTS)
    parts = [{"type": "text", "text": "a <image>"}, IMAGE, {"type": "text", "text": "b"}, IMAGE]
    found = chat(messages(("user", "a"), ("assistant", "b"), ("user", parts)))
    assert found == ["USER: a ASSISTANT: b USER: ", SEEN, SEEN, "a <\u200bimage> b ASSISTANT:"]
    plain = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    pieces = theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=False).split("<image>\n")
    assert chat(messages(("user", [{"type": "text", "text": "a"}, IMAGE]))) == [pieces[0], SEEN, pieces[1]]
    no_images = LISTS.replace("<image>\n", "")
    chat = template(tmp_path, no_images)[0]
    assert chat(messages(("user", "a"))) == ["USER: a ASSISTANT:"]
    with pytest.raises(RequestError, match="chat template shows 0 images of 1"):
        chat(messages(("user", [IMAGE])))


@pytest.mark.parametrize("vocabulary", ["bytes", "prepend"])
def test_images_stand_where_the_client_put_them(vocabulary, tmp_path):
    chat, words, theirs = template(tmp_path, BOTH, bytes_alone() if vocabulary == "bytes" else pieces(prepend=True))
    parts = [{"type": "text", "text": "a </s>"}, IMAGE, {"type": "text", "text": "b"}, {"type": "text", "text": "a"}]
    found = chat(messages(("developer", "b"), ("user", parts)))
    assert found == ["<s>system: b</s>\nuser: a <\u200b/s>", SEEN, "b\na</s>\n"]
    assert all(isinstance(item, ChatText) for item in found if item != SEEN)
    layout = lay_out([b"1" if item == SEEN else item for item in found], words, 3)
    # As one text with a special token for the image.
    theirs.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    whole = theirs.encode("".join("<|image|>" if item == SEEN else item for item in found), add_special_tokens=False)
    (place,) = layout.image_starts
    assert layout.places.tolist() == [WORD] * place + [0, 1, 2] + [WORD] * (len(whole) - place - 1)
    assert [*layout.tokens[:place], words.image_id, *layout.tokens[place + 3 :]] == whole


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for x", "chat: line 1: unexpected end"),
        ("{{ raise_exception('not\nme') }}", r"chat: .*chat template cannot take these messages \(not me\)"),
        ("nothing", "chat: the chat template leaves out what a user says"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "underscore"),
        ("{% for i in range(100001) %}{% endfor %}", "Range too big"),
    ],
)
def test_templates_that_fail_are_one_line(source, says, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    published(tmp_path / "tokenizer", bytes_alone(), SPECIAL, source)
    with pytest.raises(TemplateError, match=says) as caught:
        templates_for(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer'}: ")
    assert str(caught.value).endswith("; --template raw does without it")
    assert "\n" not in str(caught.value)
    assert (templates_for(tmp_path, "raw").default, templates_for(tmp_path, "qa").default) == ("raw", "qa")


def test_a_request_that_a_template_refuses(tmp_path):
    chat = template(tmp_path, LLAMA2)[0]
    with pytest.raises(RequestError, match=r"cannot take these messages \(Roles must alternate now\)"):
        chat(messages(("assistant", "a")))


def test_the_server_applies_the_tokenizers_template(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer.load(published(folder, bytes_alone(), SPECIAL, CHATML)).save(folder)  # as a model folder holds it
    assert (folder / "chat_template.jinja").read_text() == CHATML
    found = templates_for(tmp_path)
    assert found.default == "chat"
    body = {"messages": [{"role": "user", "content": "a"}]}
    asked = found.items(parse(body, ChatRequest))
    assert asked == ["<s>system\nYou help.</s>\n<s>user\na</s>\n<s>assistant\n"]
    assert found.items(parse({**body, "template": "raw"}, ChatRequest)) == ["a"]
    assert templates_for(tmp_path, "raw").default == "raw"
    (tmp_path / "model.json").write_text('{"model": {}, "run": {"data": {"kind": "openmoji"}}}')
    assert templates_for(tmp_path).default == "qa"
    assert templates_for(tmp_path, "chat").default == "chat"

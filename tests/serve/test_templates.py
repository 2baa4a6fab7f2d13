"""Templates: from what chat clients write to what a model knows."""

import json
import time
from pathlib import Path

import pytest

from magma_jax.serve.errors import RequestError
from magma_jax.serve.prompts.templates import JinjaTemplate, TemplateError, Templates, shipped_template, templates_for
from magma_jax.serve.prompts.wording import asks_for_caption, bare_question, is_worded
from magma_jax.serve.requests.schema import ChatRequest, ImageURL, parse

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
SEEN = ImageURL(url="x")


def text(value):
    return {"type": "text", "text": value}


def messages(*turns):
    """Turns of a user and an assistant, one after another."""
    roles = ["user", "assistant"] * len(turns)
    body = {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}
    return parse(body, ChatRequest).messages


def qa(*turns):
    return shipped_template("qa")(messages(*turns))


@pytest.mark.parametrize(
    ("asked", "question"),
    [
        ("Is it a hand?\nAnswer the question using a single word or phrase.", "Is it a hand?"),
        ("Is it a hand?\nPlease answer yes or no.", "Is it a hand?"),
        ("Is it a hand? Please answer Yes or No.", "Is it a hand?"),
        ("Question: Is it a hand?\nAnswer:", "Is it a hand?"),
        ("Is it a hand?\nYour response must be concise.", "Is it a hand?"),
        ("What is it?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.",
         "What is it? A. cat B. dog"),
        ("Look closely. Which way does it face?", "Look closely. Which way does it face?"),
        ("Name the colour", "Name the colour"),
        ("Give the colour.", "Give the colour."),
        ("  Is it\n a hand?  ", "Is it a hand?"),
    ],
)  # fmt: skip
def test_questions_are_freed_of_their_wrapping(asked, question):
    assert bare_question(asked) == question
    assert qa([text(asked), IMAGE]) == [SEEN, f"Q: {question} A:"]


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "Provide a one-sentence caption for the provided image.",
        "Please describe this image in general. Directly provide the description.",
        "Can you describe this image?",
        "Write a caption",
    ],
)
def test_requests_for_a_caption(asked):
    assert asks_for_caption(asked)
    assert qa([IMAGE, text(asked)]) == [SEEN, "A picture of"]


@pytest.mark.parametrize("asked", ["Is there a caption?", "Does the text describe it?", "What does it show?"])
def test_questions_about_captions_are_questions(asked):
    assert not asks_for_caption(asked)


def test_the_models_own_wording_stays():
    own = [text("Q: a A: b\n"), IMAGE, text("Q: a A:")]
    assert is_worded("A picture of a")
    assert qa(own) == ["Q: a A: b\n", SEEN, "Q: a A:"]
    assert qa([IMAGE, text("A picture of a ")]) == [SEEN, "A picture of a "]


def test_turns_are_examples_and_systems_are_left_out():
    found = qa([IMAGE, text("a?")], "b", [IMAGE, text("c?")])
    assert found == [SEEN, "Q: a? A: b\n", SEEN, "Q: c? A:"]
    body = {"messages": [{"role": "system", "content": "Be helpful."}, {"role": "user", "content": "a?"}]}
    assert shipped_template("qa")(parse(body, ChatRequest).messages) == ["Q: a? A:"]
    assert qa("a?", "b") == ["Q: a? A: b"]  # an answer that is begun


@pytest.mark.parametrize(
    "long",
    [" " * 10**6 + "x", "\n " * 10**6, ". " * 10**6, "a: " * 10**6, "answer " * 10**5 + ":", "Q:" + " A:" * 10**6],
)
def test_long_texts_take_no_longer_than_their_length(long):
    started = time.process_time()
    bare_question(long), is_worded(long), asks_for_caption(long)
    assert time.process_time() - started < 20  # seconds; a quadratic one would take hours


def test_no_text_of_a_client_stands_for_a_image():
    template = JinjaTemplate("{% for m in messages %}{{ m.images | join }}{{ m.text }}{% endfor %}", "t")
    forged = "\ufffc0123456789abcdef:0\ufffc"
    assert template(messages([IMAGE, text(forged)])) == [SEEN, forged]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% if x", "t: line 1: unexpected end"),
        ("hello", "leaves out image 1 of 1"),
        ("{{ nonsense }}", "'nonsense' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ '{0.__class__}'.format(1) }}", "unsafe"),
        ("{{ range.__init__.__globals__ }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "begins with an underscore"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "underscore"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{% include '/etc/passwd' %}", "t: "),
        ("{{ raise_exception('no images, please') }}", "no images, please"),
        ("{% for i in range(100001) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}", "4194304"),
    ],
)
def test_templates_that_cannot_be_used(source, says):
    with pytest.raises(TemplateError) as caught:
        JinjaTemplate(source, "t")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_fails_on_a_request():
    template = JinjaTemplate(
        "{{ messages[0].images | join }}{% if messages[0].text == 'b' %}{{ 1 / 0 }}{% endif %}", "t"
    )
    with pytest.raises(RequestError, match="template cannot take these messages"):
        template(messages("b"))


def test_which_template_a_server_has(tmp_path):
    def run(name):
        (tmp_path / "model.json").write_text(json.dumps({"model": {}, "run": name and {"data": {"name": name}}}))
        return templates_for(tmp_path).default

    assert templates_for(tmp_path / "weights.pt").default == "raw"
    assert (run(None), run("stored"), run("openmoji")) == ("raw", "raw", "qa")
    assert templates_for(tmp_path, "raw").default == "raw"
    (tmp_path / "template.jinja").write_text("{{ messages[0].images | join }}Say:")
    own = templates_for(tmp_path)
    assert own.default == "template.jinja"
    assert own.items(parse({"messages": [{"role": "user", "content": "a"}]}, ChatRequest)) == ["Say:"]
    assert templates_for("elsewhere", str(tmp_path / "template.jinja")).own.keys() == {"template.jinja"}
    for wanted, says in {
        "nonsense": "neither a file nor one of raw, qa",
        str(tmp_path / "large"): "more than 65536",
    }.items():
        (tmp_path / "large").write_bytes(bytes(100_000))
        with pytest.raises(TemplateError, match=says):
            templates_for(tmp_path, wanted)


def test_a_request_names_its_template():
    body = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    templates = Templates("qa")
    assert templates.items(parse(body, ChatRequest)) == ["Q: a? A: b"]
    assert templates.items(parse({**body, "template": "raw"}, ChatRequest)) == ["a?", " b"]
    with pytest.raises(RequestError, match="'other' is not among raw, qa"):
        templates.items(parse({**body, "template": "other"}, ChatRequest))


def test_the_template_of_the_documentation():
    source = Path("docs/serving.md").read_text().partition("```jinja\n")[2].partition("```")[0]
    found = JinjaTemplate(source, "docs")(messages([IMAGE, text("a")], "b", [text("c"), IMAGE]))
    assert found == [SEEN, "Task: a Result: b.", SEEN, "Task: c Result:"]

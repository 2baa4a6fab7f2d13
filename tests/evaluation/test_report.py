"""The report: one well-formed file that needs nothing else."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from magma_jax.data.format.records import Sample
from magma_jax.evaluation.own_split import figures_of
from magma_jax.evaluation.report.charts import line_chart, ticks
from magma_jax.evaluation.report.overview import overview_image
from magma_jax.evaluation.report.run_report import write_report
from magma_jax.evaluation.results.results import CONDITIONS, Evaluation
from magma_jax.output import replace_file
from tests import tiny

DATA = tiny.dataset()
VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Elements of a page; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def evaluation_of(samples, said):
    predictions = {condition: list(said) for condition in CONDITIONS}
    figures = figures_of(samples, said)
    questions = [sample.kind for sample in samples if sample.kind != "caption"]
    protocol = {
        "split": "test",
        "captions": len(samples) - len(questions),
        "questions": len(questions),
        "questions_by_kind": {kind: questions.count(kind) for kind in questions},
        "decoding": "greedy",
        "max_new_tokens": 9,
    }
    figures = figures | {condition: dict(figures) for condition in CONDITIONS[1:]} | {"protocol": protocol}
    return Evaluation(figures, samples, predictions, [0] * len(samples))


@pytest.fixture
def evaluation():
    samples = DATA.evaluation["test"]
    return evaluation_of(samples, [s.answer.strip() if i % 3 else "a <b>grey</b> one" for i, s in enumerate(samples)])


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 3 / step, "samples_per_second": 100.0} for step in range(1, 9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def report(tmp_path, evaluation, metrics, data=DATA):
    write_report(tmp_path / "report.html", evaluation, data, metrics)
    return (tmp_path / "report.html").read_text()


def test_it_is_well_formed_and_loads_nothing(tmp_path, evaluation, metrics):
    text = report(tmp_path, evaluation, metrics)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed"), tag
        for name in ("src", "srcset", "href", "data", "action"):
            value = attributes.get(name) or ""
            assert value.startswith("data:image/png;base64,") or name == "href" or not value, (tag, value)
    assert "url(" not in text
    assert "@import" not in text
    assert "fetch(" not in text
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "$" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL), "a placeholder was left"


def test_every_image_is_there_once_in_its_colours(tmp_path, evaluation, metrics):
    images = Page(report(tmp_path, evaluation, metrics)).all("img")
    assert len(images) == len(DATA.images)
    for attributes, (name, colour) in zip(images, tiny.COLOURS.items(), strict=True):
        assert attributes["alt"] == f"a {name} square"
        pixels = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1]))).convert("RGB")
        assert pixels.size == (96, 96)
        np.testing.assert_allclose(np.asarray(pixels), np.broadcast_to(colour, (96, 96, 3)), atol=2)


def test_right_and_wrong_are_marked_and_wrong_ones_show_the_truth(tmp_path, evaluation, metrics):
    text = report(tmp_path, evaluation, metrics)
    items = Page(text).all("li")
    assert [item["class"].split()[0] for item in items].count("right") == sum(evaluation.right())
    assert len(items) == len(evaluation.samples)
    assert {item["data-kind"] for item in items} == {"caption", "colour"}
    marks = [span["aria-label"] for span in Page(text).all("span") if "aria-label" in span]
    assert marks == [item["class"].split()[0] for item in items]
    assert text.count("truth: ") == len(items) - sum(evaluation.right())


def test_texts_are_text(tmp_path, metrics):
    evil = '"><script>alert(1)</script> & $table ${kinds}'
    samples = [Sample(0, f"Q: {evil} A:", f" {evil}", evil), Sample(0, "A picture of", f" {evil}", "caption")]
    text = report(tmp_path, evaluation_of(samples, [evil, evil + "!"]), metrics)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in text
    assert evil in "".join(page.text)
    assert page.all("img")[0]["alt"] == evil


def test_curves_have_labelled_axes(tmp_path, evaluation, metrics):
    page = Page(report(tmp_path, evaluation, metrics))
    assert [svg["aria-label"] for svg in page.all("svg")] == ["loss (nats a token) over step", "samples/s over step"]
    assert all(len(line["points"].split()) == 8 for line in page.all("polyline"))
    assert {"loss (nats a token)", "samples/s", "step"} <= set(page.text)


def test_a_run_that_was_validated_has_that_curve_too(tmp_path, evaluation, metrics):
    with metrics.open("a") as file:
        file.write('{"step": 4, "validation_loss": 2.0}\n{"step": 8, "validation_loss": 1.5}\n')
    labels = [svg["aria-label"] for svg in Page(report(tmp_path, evaluation, metrics)).all("svg")]
    assert labels == [
        "loss (nats a token) over step",
        "validation loss (nats a token) over step",
        "samples/s over step",
    ]


def test_a_resumed_run_draws_each_step_once_and_half_a_line_is_counted(tmp_path, evaluation, metrics):
    with metrics.open("a") as file:
        file.write('{"step": 9, "lo')
        file.write('\n{"step": 8, "loss": 9.0, "samples_per_second": 1.0}\n')
    text = report(tmp_path, evaluation, metrics)
    assert all(len(line["points"].split()) == 8 for line in Page(text).all("polyline"))
    assert "1 unreadable" in text


def test_without_metrics_it_says_so(tmp_path, evaluation):
    text = report(tmp_path, evaluation, tmp_path / "nothing.jsonl")
    assert "No training metrics: nothing.jsonl is missing or empty." in text
    assert "<svg" not in text


def test_the_images_source_and_licence_are_named(tmp_path, evaluation, metrics):
    links = [link["href"] for link in Page(report(tmp_path, evaluation, metrics)).all("a")]
    assert links == ["https://openmoji.org", "https://creativecommons.org/licenses/by-sa/4.0/"]


def test_ticks_are_round_and_cover_the_values():
    assert ticks(5) == [0, 1, 2, 3, 4, 5]
    assert ticks(0.37) == [0, 0.1, 0.2, 0.3, 0.4]
    assert ticks(0) == [0, 1]
    assert ticks(1400)[-1] >= 1400
    assert "circle" in line_chart([1], [2], "x", "y")
    with pytest.raises(ValueError, match="0 x and 0 y"):
        line_chart([], [], "x", "y")


def test_overview_has_text_in_both_colours_and_is_the_same_twice(tmp_path, evaluation):
    overview_image(tmp_path / "a.png", evaluation, DATA)
    overview_image(tmp_path / "b.png", evaluation, DATA)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape[1] == 1200
    assert (pixels == (26, 127, 71)).all(-1).any()
    assert (pixels == (179, 53, 43)).all(-1).any()


def test_overview_without_captions_is_refused(tmp_path):
    questions = [sample for sample in DATA.evaluation["test"] if sample.kind == "colour"]
    with pytest.raises(ValueError, match="no image"):
        overview_image(tmp_path / "a.png", evaluation_of(questions, ["red"] * 4), DATA)
    assert not (tmp_path / "a.png").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    replace_file(path, b"old")
    with pytest.raises(TypeError):
        replace_file(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_predictions_are_judged_by_the_letter(evaluation):
    other = dataclasses.replace(evaluation, predictions={"model": [t.upper() for t in evaluation.truths]})
    assert not any(other.right())

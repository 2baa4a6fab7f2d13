"""Tasks: shots, prompts, what is kept of an answer; the same answers however they are computed."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from magma_jax import Magma
from magma_jax.config import ConfigError
from magma_jax.data.format.records import DataError
from magma_jax.data.images import ImageInput
from magma_jax.data.write.conversion import ConvertOptions, convert
from magma_jax.evaluation import command
from magma_jax.evaluation.arguments import add_task_options
from magma_jax.evaluation.tasks import answering
from magma_jax.evaluation.tasks.answering import Answerer, PromptError, join_texts
from magma_jax.evaluation.tasks.examples import OwnExamples, StoredExamples, spaced
from magma_jax.evaluation.tasks.few_shot import evaluate_task
from magma_jax.evaluation.tasks.shots import choose_shots, draw_shots
from magma_jax.evaluation.tasks.task import TASKS, TaskConfig
from magma_jax.evaluation.tasks.truncation import truncate
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.inference.prompts import lay_out
from magma_jax.models.magma import SHARDINGS
from magma_jax.nn.modules import merge
from magma_jax.runtime.sharding import MeshConfig, make_mesh, parameter_shardings
from tests import tiny
from tests.evaluation.conftest import DATA, jpeg, vqa_records

OWN = dataclasses.replace(TASKS["own_questions"], max_new_tokens=4)


def stored(folders, **changes):
    places = {"data": str(folders / "val"), "shot_data": str(folders / "train")}
    return dataclasses.replace(TASKS["vqav2"], max_new_tokens=4, **places | changes)


def test_shots_depend_on_seed_and_query_alone():
    four = draw_shots(100, 4, 0, ["a", "b", "c"])
    assert draw_shots(100, 4, 0, ["c", "a"]) == [four[2], four[0]]
    assert [row[-2:] for row in four] == draw_shots(100, 2, 0, ["a", "b", "c"])
    assert len({tuple(row) for row in four}) == 3
    assert draw_shots(100, 4, 1, ["a"]) != four[:1]
    assert draw_shots(100, 0, 0, ["a", "b"]) == [[], []]
    assert draw_shots(100, 0, 0, None) == [[]]
    all_of_five = draw_shots(5, 4, 0, ["a"], lambda query, row: row != 3)[0]
    assert sorted(all_of_five) == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="5 examples are too few to draw 5 shots"):
        draw_shots(5, 5, 0, ["a"], lambda query, row: row != 3)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("none", "dark blue sky\nQ: and"),
        ("newline", "dark blue sky"),
        ("words", "dark blue"),
        ("characters", "dark blue s"),
    ],
)
def test_what_is_kept_of_an_answer(how, kept):
    assert truncate(" dark blue sky\nQ: and ", ["red", "light green"], how, DATA.tokenizer) == kept


def test_tokens_are_counted_as_in_a_prompt():
    longest = len(DATA.tokenizer.encode(" a red square"))
    text = truncate("a red square and more", ["a", "a red square"], "tokens", DATA.tokenizer)
    assert len(DATA.tokenizer.encode(f" {text}")) <= longest
    assert text.startswith("a red square")
    # Nothing can be cut to the length of an answer that is secret.
    assert truncate("one\ntwo", [], "words", DATA.tokenizer) == "one"


def test_words_that_meet_are_encoded_together():
    laid = lay_out(join_texts(["Q: ", "red?", 7, " A:"]), DATA.tokenizer, 4)
    words = DATA.tokenizer.encode("Q: red?")
    assert laid.tokens[: len(words)].tolist() == words
    assert laid.places[len(words) : len(words) + 4].tolist() == [0, 1, 2, 3]
    assert laid.images == (7,)


@pytest.fixture(scope="module")
def two_shots(talkative):
    return evaluate_task(talkative, dataclasses.replace(OWN, shots=2), DATA, batch_size=3)


def test_twice_the_same_whatever_the_batches(talkative, two_shots):
    assert len(set(two_shots.outputs)) > 1
    again = evaluate_task(talkative, dataclasses.replace(OWN, shots=2), DATA, batch_size=4)
    assert again.outputs == two_shots.outputs
    assert again.to_dict() == two_shots.to_dict()
    for example, shots in zip(two_shots.examples, two_shots.shots, strict=True):
        # Test and training images are the same here.
        assert example.image not in [shot.example.image for shot in shots]


def test_several_devices_give_what_one_gives(talkative, two_shots):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, model=2, slice=2))
    params = jax.device_put(talkative.params, parameter_shardings(talkative.params, mesh, SHARDINGS))
    spread = type(talkative)(talkative.config, params, talkative.tokenizer)
    result = evaluate_task(spread, dataclasses.replace(OWN, shots=2), DATA, batch_size=3, mesh=mesh)
    assert result.outputs == two_shots.outputs
    assert result.scores == two_shots.scores


@pytest.mark.slow
def test_prompts_are_those_of_the_interface(talkative, two_shots):
    """Every position of image and text as ``Magma`` lays them out."""
    image = {i: ImageInput(Image.fromarray(DATA.images[i])) for i in range(len(DATA.images))}
    example, shots = two_shots.examples[1], two_shots.shots[1]
    prompt = []
    for _, shot in shots:
        prompt += [image[shot.image], f"Q: {shot.text} A: {shot.shown}"]
    prompt += [image[example.image], f"Q: {example.text} A:"]
    embeddings = talkative.preprocess_inputs(prompt)
    assert talkative.generate(embeddings, max_steps=4, temperature=0.0)[0] == two_shots.outputs[1]


def test_shots_of_a_whole_run_are_run_once(talkative, folders, monkeypatch):
    """Shared keys and values give what whole prompts give."""
    task = stored(folders, shots=2, shot_policy="run", sampling=SamplingConfig(temperature=1.0), seed=3)
    result = evaluate_task(talkative, task)
    assert [len(row) for row in result.shots] == [2]
    val, train = (StoredExamples(folders / name, "question", 64) for name in ("val", "train"))
    shots = [shot for _, shot in result.shots[0]]
    before = [part for s in shots for part in (len(val.images) + s.image, task.complete(s.text, s.shown))]
    pixels = np.concatenate([s.images[np.arange(len(s.images))] for s in (val, train)])
    prompts = [(*before, example.image, task.ask(example.text)) for example in val]
    answers = Answerer(talkative, pixels)(prompts, max_new_tokens=4, sampling=task.sampling, seed=3)
    assert answers == result.outputs
    assert len(set(answers)) > 2


def test_features_that_no_longer_fit_are_computed_again(talkative, two_shots, monkeypatch):
    monkeypatch.setattr(answering, "KEPT_NBYTES", 1)
    again = evaluate_task(talkative, dataclasses.replace(OWN, shots=2), DATA, batch_size=3)
    assert again.outputs == two_shots.outputs


def test_a_folder_is_asked_and_scored_by_group(talkative, folders):
    result = evaluate_task(talkative, stored(folders, shots=1, limit=5))
    assert [example.id for example in result.examples] == ["0", "10", "20", "31", "41"]
    assert result.stamp["of"] == 12
    assert set(result.scores["vqa_official"].groups["answer_type"]) == {"yes/no", "other"}
    assert all(len(row) == 1 and int(row[0].example.id) >= 1000 for row in result.shots)
    assert set(result.scores) == {"vqa_official", "vqa_before_2021", "vqa_always_normalised"}


def test_captions_and_blindness(talkative, folders):
    task = dataclasses.replace(TASKS["nocaps"], data=str(folders / "val"), max_new_tokens=4, blind=True)
    result = evaluate_task(talkative, task)
    assert set(result.scores["nocaps_nlgeval"].groups["domain"]) == {"in-domain"}
    assert len(set(result.outputs)) == 1
    assert result.examples[0].answers == ("an image 0", "a square")


@pytest.fixture(scope="module")
def classifier(talkative):
    """``talkative`` with a head of two classes, one the opposite of the other."""
    row = np.random.default_rng(0).normal(size=32).astype(np.float32)
    head = {"class_head/weight": jnp.array([row, -row]), "class_head/bias": jnp.zeros(2)}
    config = dataclasses.replace(tiny.MODEL, classes=2)
    return Magma(config, talkative.params | head, DATA.tokenizer)


def test_statements_are_put_into_classes(classifier, folders):
    task = dataclasses.replace(TASKS["snli_ve"], data=str(folders / "val"), classes=("yes", "red"))
    result = evaluate_task(classifier, task)
    turned = {k: -v if k == "class_head/weight" else v for k, v in classifier.params.items()}
    opposite = evaluate_task(Magma(classifier.config, turned, DATA.tokenizer), task)
    assert all({one, other} == {"yes", "red"} for one, other in zip(result.outputs, opposite.outputs, strict=True))
    right = [output in example.answers for output, example in zip(result.outputs, result.examples, strict=True)]
    assert result.scores["accuracy"].scores["accuracy"] == pytest.approx(100 * np.mean(right))
    with pytest.raises(DataError, match="the head has 2 classes, but 3 names"):
        evaluate_task(classifier, dataclasses.replace(task, classes=("a", "b", "c")))


@pytest.mark.slow
def test_a_statement_is_classified_by_its_last_token(classifier, folders):
    task = dataclasses.replace(TASKS["snli_ve"], data=str(folders / "val"), classes=("yes", "red"))
    result = evaluate_task(classifier, task)
    for example, output in zip(result.examples, result.outputs, strict=True):
        image = ImageInput(Image.fromarray(result.images[np.array([example.image])][0]))
        embeddings = classifier.preprocess_inputs([image, example.text])
        model = merge(classifier.graphdef, classifier.params)
        logits = model.class_logits(embeddings, jnp.array([embeddings.shape[1]]))
        assert output == task.classes[int(logits[0].argmax())]


def test_a_model_without_a_head_says_so(talkative, folders):
    with pytest.raises(PromptError, match="no classification head"):
        evaluate_task(talkative, dataclasses.replace(TASKS["snli_ve"], data=str(folders / "val")))


def test_what_a_shot_shows_is_the_commonest_answer(folders):
    examples = StoredExamples(folders / "val", "question", 64)
    assert [example.shown for example in (examples[0], examples[1])] == ["yes", "red"]
    assert examples[1].reference("okvqa_stemmed").answers == ("red",) * 10
    assert examples[1].reference("okvqa_raw_answer").answers == ("reds",) * 10
    with pytest.raises(DataError, match="no domain"):
        examples[1].reference("nocaps")


def test_long_prompts_are_an_error_or_lose_shots(talkative, folders, monkeypatch):
    with pytest.raises(PromptError, match="context holds 64; lower shots"):
        evaluate_task(talkative, stored(folders, shots=6))
    asked = []
    monkeypatch.setattr(
        Answerer, "__call__", lambda self, prompts, **_: asked.extend(prompts) or ["red"] * len(prompts)
    )
    result = evaluate_task(talkative, stored(folders, shots=6, overlong="drop_shots"))
    assert result.stamp["longest_prompt"] + 4 <= 64
    # A shot is an image and words; the question itself is another.
    shots = [len(prompt) // 2 - 1 for prompt in asked]
    assert result.stamp["shots"]["dropped"] == sum(6 - number for number in shots) > 0
    # The last ones stay, which are those of fewer shots.
    last = result.shots[0][-1].example
    assert asked[0][-3] == result.task.complete(last.text, last.shown)


@pytest.mark.parametrize("policy", ["query", "run"])
def test_a_shot_is_never_the_images_own_whatever_it_is_called(policy, folders, tmp_path):
    """Two of four images to draw from are also asked about: one under another id, one as another file."""
    asked = StoredExamples(folders / "val", "question", 64)
    records = list(vqa_records(4, first=200))
    renamed = dataclasses.replace(records[0], id="renamed", image=jpeg(0))
    encoded_again = dataclasses.replace(records[1], id="1")
    convert([renamed, encoded_again, *records[2:]], tmp_path / "pool", ConvertOptions(workers=0))
    pool = StoredExamples(tmp_path / "pool", "question", 64)
    task = stored(folders, shots=4, shot_policy=policy)
    shots = choose_shots(task, asked, pool, list(asked))
    forbidden = [{0, 1} if policy == "run" else {0, 1} & {example.image} for example in asked]
    for chosen, own in zip(shots, forbidden, strict=policy == "query"):
        assert own.isdisjoint(shot.example.image for shot in chosen)
    # Pixels are compared where one side has nothing else.
    drawn = dataclasses.replace(DATA, images=pool.images[np.arange(4)])
    own = OwnExamples(drawn, "test", "question")
    shots = choose_shots(task, own, pool, list(own)) if policy == "query" else []
    for example, chosen in zip(own, shots, strict=policy == "query"):
        assert example.image not in [shot.example.image for shot in chosen]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shot_data": None, "shots": 1, "shot_policy": "run"}, "may not come from the questions"),
        ({"data": "nowhere"}, "no dataset folder"),
        ({"shots": 99}, "10 examples are too few to draw 99 shots"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(talkative, folders, change, message):
    with pytest.raises(DataError, match=message) as error:
        evaluate_task(talkative, stored(folders, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": ("vqa",)}, "choose from"),
        ({"prompt": "Q: A:"}, "needs one {}"),
        ({"shots": -1}, "shots must not be negative"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"kind": "class"}, "needs the names of its classes"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TASKS["vqav2"], **change)


def test_settings_are_what_is_not_the_tasks_own():
    assert dataclasses.replace(TASKS["vqav2"], shots=4, data="x").settings == {}
    changed = dataclasses.replace(TASKS["vqav2"], truncation="newline", limit=9)
    assert changed.settings == {"limit": 9, "truncation": "newline"}
    assert TaskConfig("mine", "caption", ("coco",), prompt="p").settings == {}


def arguments(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int)
    parser.add_argument("--split", default="test")
    add_task_options(parser)
    return parser.parse_args(["--task", "vqav2", "gqa", *words])


def test_the_command_line_gives_every_task_its_folder_and_settings():
    words = ("--data", "vqav2=a", "gqa=b", "--shot-data", "c", "--shots", "0", "2", "--limit", "7", "--set", "seed=3")
    tasks = [task for name in ("vqav2", "gqa") for task in command.configure(name, arguments(*words))]
    assert [(task.name, task.data, task.shot_data, task.shots) for task in tasks] == [
        ("vqav2", "a", "c", 0),
        ("vqav2", "a", "c", 2),
        ("gqa", "b", "c", 0),
        ("gqa", "b", "c", 2),
    ]
    assert {(task.limit, task.seed) for task in tasks} == {(7, 3)}
    with pytest.raises(ConfigError, match="of several folders each needs its task"):
        command.configure("gqa", arguments("--data", "a", "b"))
    with pytest.raises(ConfigError, match="unknown key"):
        command.configure("gqa", arguments("--set", "shot=1"))
    with pytest.raises(ConfigError, match="gqa: shots must not be negative"):
        command.configure("gqa", arguments("--shots", "-1"))
    (task,) = command.configure("gqa", arguments("--set", "prompt={}", "shots=2"))
    assert (task.prompt, task.shots) == ("{}", 2)


def test_classes_come_from_the_run_in_its_order(tmp_path):
    task = TASKS["snli_ve"]
    assert command.with_classes_of(task, tmp_path) == task
    names = ["contradiction", "entailment", "neutral"]
    for classes, message in ((names, None), (["yes", "no"], "was trained on the classes yes, no")):
        content = {"model": {}, "run": {"data": {"classes": classes}}}
        (tmp_path / "model.json").write_text(json.dumps(content))
        if message is None:
            assert command.with_classes_of(task, tmp_path).classes == tuple(names)
        else:
            with pytest.raises(ConfigError, match=message):
                command.with_classes_of(task, tmp_path)


def test_numbers_are_evenly_spaced():
    assert list(spaced(3, None)) == list(spaced(3, 9)) == [0, 1, 2]
    assert list(spaced(10, 3)) == [0, 3, 6]

"""Evaluation on a split of a dataset: captions and questions, with three baselines.

    model      the image and the prompt
    blind      a black image and the prompt: the language prior
    shuffled   another sample's image and the prompt
    constant   no model: the most frequent training answer to the same prompt

Decoding is greedy and ends at the model's own end of text. Nothing is cut to the length of the true answer, and the
limit on new tokens comes from the training split, so the ground truth never leaks into the answers.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.data.dataset import Dataset
from magma_jax.data.datasets import load_dataset, read_stored_config
from magma_jax.data.openmoji.dataset import OpenmojiConfig
from magma_jax.evaluation.metrics.baselines import most_frequent_answers, shuffle_images
from magma_jax.evaluation.metrics.by_protocol import METRICS
from magma_jax.evaluation.report.overview import overview_image
from magma_jax.evaluation.report.run_report import OPENMOJI, write_report
from magma_jax.evaluation.results.names import file_stem
from magma_jax.evaluation.results.results import CAPTION, Evaluation, table, write_predictions, write_results
from magma_jax.evaluation.tasks.answering import Answerer, PromptError
from magma_jax.evaluation.tasks.examples import BlackImages, JoinedImages, close, spaced
from magma_jax.inference.generator import TokenGenerator
from magma_jax.output import printable
from magma_jax.storage.model_folder import CheckpointError, read_model_json
from magma_jax.training.checkpoints.checkpoint import CHECKPOINTS, RunCheckpoints
from magma_jax.typing import UInt8

__all__ = ["Evaluation", "EvaluationError", "evaluate", "evaluate_run", "table"]

# Maximum number of training samples, evenly spaced, to scan for frequent and long answers: all of the quick start's.
LOOKED_AT = 50_000

SCALES = {
    "caption_exact": {"protocol": "exact_match", "scale": "percent, 0 to 100"},
    "bleu4": {"protocol": "coco", "scale": "0 to 1"},
    "cider": {"protocol": "coco", "scale": "0 to 10, rarity counted over the evaluated captions"},
    "rouge_l": {"protocol": "coco", "scale": "0 to 1"},
    "vqa_accuracy": {"protocol": "vqa_official", "scale": "percent, 0 to 100; the one true answer counts ten times"},
}


class EvaluationError(ValueError):
    """A split that cannot be evaluated; the message is one line with the reason."""


def evaluate_run(
    open_model: Callable[..., TokenGenerator],
    workdir: str | Path,
    split: str = "test",
    limit: int | None = None,
    overview: str | Path | None = None,
    *,
    ema: bool | None = None,
) -> Evaluation:
    """Evaluates a run, prints the table and writes its files into the run folder.

    A run is evaluated at its best validated step, or at its newest if it was not validated; ``workdir`` may also be a
    folder derived from a run, such as a quantized one; ``open_model`` opens it (``families``). The files are
    ``results.json``, ``predictions.jsonl`` and ``report.html``. A split other than ``test``, or a limit, is part of
    their names (``results-split=validation-limit=50-1c9e2f0a.json``), so that it is not mistaken for the full result.
    ``overview`` names a PNG file to write, with twelve images and their texts. ``ema`` chooses between the weights and
    their moving averages; default: whichever the run was validated with.

    Raises:
        CheckpointError: the folder holds no run, or none with a checkpoint. ConfigError: a run of another kind of
            model. EvaluationError: see ``evaluate``.
    """
    workdir = Path(workdir)
    metadata, has_steps = read_model_json(workdir), (workdir / CHECKPOINTS).is_dir()
    run = metadata.get("run")
    # A folder derived from a run names its source and holds all trained parameters; a run without steps has none.
    if run is None or not (has_steps or "source" in metadata):
        raise CheckpointError(f"{workdir}: holds no checkpoint of a run; give the --workdir that train.py trained in")
    model = open_model(workdir, ema=ema)
    stamp = {"training_seed": run["seed"]} | ({} if ema is None else {"ema": ema})
    if has_steps:
        with RunCheckpoints(workdir) as checkpoints:
            stamp["checkpoint_step"] = checkpoints.result_step()
    config = read_stored_config(run["data"])
    dataset = load_dataset(config)
    evaluation = evaluate(model, dataset, split, limit, stamp=stamp)
    settings = {"split": split} if split != "test" else {}
    settings |= {"limit": limit} if limit is not None else {}
    settings |= {"ema": ema} if ema is not None else {}
    suffix = f"-{file_stem('', settings, settings)}" if settings else ""
    write_results(workdir / f"results{suffix}.json", evaluation)
    write_predictions(workdir / f"predictions{suffix}.jsonl", evaluation)
    attribution = OPENMOJI if isinstance(config, OpenmojiConfig) else ""
    write_report(workdir / f"report{suffix}.html", evaluation, dataset, workdir / "metrics.jsonl", attribution)
    if overview is not None:
        overview_image(overview, evaluation, dataset)
    print(printable(table(evaluation.figures)))
    return evaluation


def evaluate(
    model: TokenGenerator,
    dataset: Dataset,
    split: str = "test",
    limit: int | None = None,
    *,
    seed: int = 0,
    batch_size: int = 128,
    max_new_tokens: int | None = None,
    stamp: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Answers every prompt of a split under every condition and scores the answers.

    Args:
        limit: maximum number of captions, and of questions, evenly spaced; None for all.
        seed: seed of the images for ``shuffled``.
        batch_size: prompts per batch; affects speed, not results.
        max_new_tokens: default: the length of the longest training answer plus the end of text.
        stamp: added to ``figures["protocol"]``, such as the checkpoint's step.

    Raises:
        EvaluationError: no such split, an empty one, no training split (``constant`` and the default of
            ``max_new_tokens`` need it), images of another size than the encoder's, or prompts that exceed the model's
            context.
    """
    samples = _select(dataset, split, limit)
    training = _spaced(dataset.evaluation.get("train", []), LOOKED_AT)
    if not training:
        raise EvaluationError("the dataset has no training split, which the most frequent answers are taken from")
    if max_new_tokens is None:
        max_new_tokens = 1 + max(len(model.tokenizer.encode(sample.answer)) for sample in training)
    images = [int(sample.image) for sample in samples]
    try:
        shuffled = shuffle_images(samples, seed)
    except ValueError as error:
        raise EvaluationError(f"split {split!r}: {error}") from None

    if dataset.images is None:
        raise EvaluationError("the dataset has no images; eval.py asks about images")
    black = len(dataset.images)
    shown = {"model": images, "blind": [black] * len(samples), "shuffled": shuffled}
    requests = {
        condition: [(row, sample.prompt) for row, sample in zip(shown[condition], samples, strict=True)]
        for condition in shown
    }
    # Each pair of image and prompt is run once, even if several conditions need it.
    distinct = sorted({request for wanted in requests.values() for request in wanted})
    size = _image_size(model, dataset.images[images[:1]])
    answerer = Answerer(model, JoinedImages(dataset.images, BlackImages(1, size)), batch_size=batch_size)
    try:
        texts = answerer(distinct, max_new_tokens=max_new_tokens)
    except PromptError as error:
        raise EvaluationError(str(error)) from None
    close(dataset.images)
    answers = {request: text.strip() for request, text in zip(distinct, texts, strict=True)}
    predictions = {name: [answers[request] for request in wanted] for name, wanted in requests.items()}
    predictions["constant"] = most_frequent_answers(samples, training)

    scores = {condition: figures_of(samples, texts) for condition, texts in predictions.items()}
    kinds = Counter(sample.kind for sample in samples)
    questions = {kind: count for kind, count in sorted(kinds.items()) if kind != CAPTION}
    protocol = {
        "split": split,
        "limit": limit,
        "captions": kinds[CAPTION],
        "questions": sum(questions.values()),
        "questions_by_kind": questions,
        "metrics": SCALES,
        "caption_prompts": sorted({sample.prompt for sample in samples if sample.kind == CAPTION}),
        "question_prompt": next((sample.prompt for sample in samples if sample.kind != CAPTION), None),
        "shots": 0,
        "decoding": "greedy",
        "max_new_tokens": max_new_tokens,
        "truncation": "none; a text ends at the model's end of text or at max_new_tokens",
        "shuffle_seed": seed,
        **(stamp or {}),
    }
    figures = scores.pop("model") | scores | {"protocol": protocol}
    return Evaluation(figures, samples, predictions, shuffled)


def figures_of(samples: Sequence[Any], predictions: Sequence[str]) -> dict[str, Any]:
    """The metrics of one condition; None if there are no captions or no questions.

    Questions here have one true answer, but the official VQA rule needs ten annotators. The answer counts as ten equal
    ones, for which the rule reduces to exact match: 100 for an equal string, 0 for any other.
    """
    pairs = [(sample, text, [sample.answer.strip()]) for sample, text in zip(samples, predictions, strict=True)]
    captions = [pair for pair in pairs if pair[0].kind == CAPTION]
    questions = [pair for pair in pairs if pair[0].kind != CAPTION]
    figures: dict[str, Any] = {**dict.fromkeys(SCALES), "vqa_by_kind": {}}
    if captions:
        _, texts, truths = zip(*captions, strict=True)
        coco = METRICS["coco"](texts, truths).total
        figures |= {
            "caption_exact": METRICS["exact_match"](texts, truths).total["accuracy"],
            "bleu4": coco.get("BLEU-4"),
            "cider": coco["CIDEr"],
            "rouge_l": coco["ROUGE-L"],
        }
    if questions:
        asked, texts, truths = zip(*questions, strict=True)
        accuracy = METRICS["vqa_official"](texts, [truth * 10 for truth in truths])
        by_kind = accuracy.by_group([sample.kind for sample in asked])
        figures["vqa_accuracy"] = accuracy.total["accuracy"]
        figures["vqa_by_kind"] = {kind: values["accuracy"] for kind, values in sorted(by_kind.items())}
    return figures


def _select(dataset: Dataset, split: str, limit: int | None) -> list[Any]:
    if split not in dataset.evaluation:
        names = ", ".join(dataset.evaluation) or "none"
        raise EvaluationError(f"the dataset has no split {split!r}; its splits: {names}")
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit must be at least 1, got {limit}")
    samples = dataset.evaluation[split]
    if not len(samples):
        raise EvaluationError(f"the split {split!r} is empty: there is nothing to evaluate")
    if dataset.images is None or any(sample.image is None for sample in samples):
        raise EvaluationError(f"the split {split!r} has samples without an image; captions and questions need one")
    captions = [sample for sample in samples if sample.kind == CAPTION]
    questions = [sample for sample in samples if sample.kind != CAPTION]
    return [sample for group in (captions, questions) for sample in _spaced(group, limit)]


def _spaced(samples: Sequence[Any], limit: int | None) -> list[Any]:
    return [samples[i] for i in spaced(len(samples), limit)]


def _image_size(model: TokenGenerator, images: UInt8[np.ndarray, "N h w 3"]) -> int:
    size = model.images.size
    if images.shape[1] != size:
        raise EvaluationError(
            f"the images have {images.shape[1]} pixels a side, but the model's encoder takes {size}; set "
            "data.image_size"
        )
    return size

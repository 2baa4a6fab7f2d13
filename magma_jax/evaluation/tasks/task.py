"""Configs of tasks: data, prompt format, truncation of answers, and scoring.

Everything that affects a score is a field of ``TaskConfig`` and is stored with the result. The defaults are the paper's
settings where it states them (section 4.1): "Q: " and "A: ", "A picture of", shots as in Frozen, answers cut to the
length of the longest true one. Unstated settings have the likeliest value, and can be swept.
"""

import dataclasses
from types import MappingProxyType
from typing import Any, Literal

from magma_jax.config import to_dict
from magma_jax.evaluation.scoring.protocols import PROTOCOLS
from magma_jax.inference.decoding.config import SamplingConfig

Kind = Literal["question", "caption", "class"]
Truncation = Literal["none", "newline", "words", "tokens", "characters"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """One evaluation.

    Attributes:
        name: name of the results; those of ``TASKS`` are columns of the paper's tables.
        kind: questions with answers, captions, or statements for a classification head.
        protocols: scoring protocols; the first one is the task's main protocol.
        data: dataset folder written by ``python -m magma_jax.data convert``; None for the run's own data.
        split: split of the run's own data.
        shot_data: dataset folder of the shots; None for ``data`` if given, else the run's own data.
        shot_split: split of the run's own data for shots.
        limit: maximum number of examples, evenly spaced; None for all.
        shots: completed examples before each question.
        shot_policy: ``query`` selects shots per query; ``run`` shares one selection, whose keys and values are then
            computed once.
        seed: seed of shots and sampling.
        prompt: text after the image; ``{}`` is replaced by the question.
        before_answer: separator between the prompt and a shot's answer. The query's prompt ends without it, because a
            byte-pair encoding merges the space into the next word.
        after_answer: separator between a shot's answer and the next image.
        truncation: truncation of answers: the first line (``newline``), or as many ``words``, ``tokens`` or
            ``characters`` as the longest true answer has. The last three use the truth, as the paper does; scores of
            the first line are therefore also given.
        max_new_tokens: maximum number of new tokens.
        sampling: sampling parameters; greedy by default.
        overlong: a prompt that exceeds the model's context is an ``error``; or it loses its first shots, which is
            counted (``drop_shots``); or it runs at positions that the model was not trained on (``extrapolate``, for
            language models without a position table).
        blind: whether to replace images by black ones, to measure the language prior.
        classes: names of the head's outputs, in order.
    """

    name: str
    kind: Kind
    protocols: tuple[str, ...]
    data: str | None = None
    split: str = "test"
    shot_data: str | None = None
    shot_split: str = "train"
    limit: int | None = None
    shots: int = 0
    shot_policy: Literal["query", "run"] = "query"
    seed: int = 0
    prompt: str = "Q: {} A:"
    before_answer: str = " "
    after_answer: str = "\n"
    truncation: Truncation = "words"
    max_new_tokens: int = 16
    sampling: SamplingConfig = SamplingConfig()
    overlong: Literal["error", "drop_shots", "extrapolate"] = "error"
    blind: bool = False
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = [name for name in self.protocols if name not in PROTOCOLS]
        if unknown or not self.protocols:
            raise ValueError(f"protocols {self.protocols}: choose from {', '.join(PROTOCOLS)}")
        if self.shots < 0:
            raise ValueError(f"shots must not be negative, got {self.shots}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        for name in ("limit", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.kind == "class" and (self.shots or len(self.classes) < 2):
            raise ValueError(f"{self.name}: a classification head takes no shots and needs the names of its classes")
        if self.kind != "caption" and self.prompt.count("{}") != 1:
            raise ValueError(f"prompt {self.prompt!r}: needs one {{}}, where the question goes")
        if self.sampling.repetition_penalty != 1 or self.sampling.compat is not None:
            raise ValueError("sampling: repetition_penalty and compat are not for evaluation")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that differ from the task's defaults, as in ``{"limit": 100}``; plain JSON values."""
        usual = to_dict(TASKS.get(self.name, self))
        return {name: value for name, value in to_dict(self).items() if name not in _PLACES and value != usual[name]}

    def ask(self, text: str) -> str:
        """The prompt text after an image; ``text`` is the question, empty for captions."""
        # Not str.format, because a question may contain braces.
        return self.prompt.replace("{}", text)

    def complete(self, text: str, answer: str) -> str:
        """The text of a completed example, up to the next image."""
        return f"{self.ask(text)}{self.before_answer}{answer}{self.after_answer}"


# Data paths and the number of shots do not count as changed settings.
_PLACES = ("name", "data", "shot_data", "shots")


def _questions(name: str, *protocols: str, **options) -> TaskConfig:
    return TaskConfig(name, "question", protocols, **options)


def _captions(name: str, *protocols: str, **options) -> TaskConfig:
    # 64 tokens hold all but a few of COCO's captions. No truncation: the paper cuts answers, not captions.
    options = {"prompt": "A picture of", "truncation": "none", "max_new_tokens": 64} | options
    return TaskConfig(name, "caption", protocols, **options)


# The quick start never saw a newline and ends its texts itself. Its context of 128 holds three shots.
_OWN = {"after_answer": "", "truncation": "none", "overlong": "extrapolate"}

TASKS: MappingProxyType[str, TaskConfig] = MappingProxyType(
    {
        task.name: task
        for task in (
            _questions("vqav2", "vqa_official", "vqa_before_2021", "vqa_always_normalised"),
            _questions("okvqa", "okvqa_answer", "okvqa_raw_answer", "okvqa_stemmed"),
            _questions("gqa", "gqa_exact", "gqa_relaxed"),
            _questions("vizwiz", "vizwiz_by_index", "vizwiz_by_value"),
            # The paper scored captions with nlg-eval, which does not tokenise.
            _captions("coco", "coco_nlgeval", "coco"),
            _captions("nocaps", "nocaps_nlgeval", "nocaps"),
            # Question and class as in configs/finetune_snli_ve.py; the run defines the order of the classes.
            TaskConfig(
                "snli_ve",
                "class",
                ("accuracy",),
                prompt="{}",
                truncation="none",
                classes=("entailment", "neutral", "contradiction"),
            ),
            _questions("own_questions", "vqa_official", **_OWN),
            _captions("own_captions", "coco", "accuracy", **_OWN),
        )
    }
)

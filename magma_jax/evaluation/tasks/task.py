"""Tasks: what a model is asked, how a prompt is written, what is kept of its answer, and how that is judged.

Everything that changes a number is a field of ``TaskConfig`` and is stored with the result. The defaults are the
paper's settings where it states them (section 4.1): "Q: " and "A: ", "A picture of", shots as in Frozen, answers cut
to the length of the longest true one. What it does not state has the value that seems likeliest, and can be swept.
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
        name: of its results; those of ``TASKS`` are columns of the paper's tables.
        kind: questions with answers, captions, or statements that a classification head puts into classes.
        protocols: how answers are judged; the first one is what the task is known by.
        data: dataset folder that ``python -m magma_jax.data convert`` wrote; None for the run's own data.
        split: of the run's own data.
        shot_data: the folder that shots come from; None for the run's own data, or ``data`` where that is given.
        shot_split: of the run's own data.
        limit: at most so many examples, evenly spaced; None for all.
        shots: completed examples before each question.
        shot_policy: every ``query`` draws its own shots, or one draw serves the whole ``run``, whose keys and values
            are then computed once.
        seed: of the shots, and of sampling.
        prompt: text behind the image; a question takes the place of ``{}``.
        before_answer: between the prompt and the answer of a shot. The prompt itself ends without it: a byte-pair
            encoding takes the space into the next word.
        after_answer: between a shot's answer and the next image.
        truncation: what an answer is cut to: the first line (``newline``), or as many ``words``, ``tokens`` or
            ``characters`` as its longest true answer has. The last three look at the truth, as the paper does; scores
            are therefore also given for the first line.
        max_new_tokens: after which an answer ends in any case.
        sampling: how tokens are chosen; greedy by default.
        overlong: a prompt that exceeds the model's context is an ``error``; or it loses its first shots, which is
            counted (``drop_shots``); or it is run all the same, at positions that the model never saw
            (``extrapolate``, for language models without a table of positions).
        blind: shows black images: what the words alone give away.
        classes: names of the head's outputs, in their order.
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
        """Every setting that is not the task's own, as in ``{"limit": 100}``; plain JSON values."""
        usual = to_dict(TASKS.get(self.name, self))
        return {name: value for name, value in to_dict(self).items() if name not in _PLACES and value != usual[name]}

    def ask(self, text: str) -> str:
        """The words behind an image; ``text`` is the question, which captions do not have."""
        # No str.format: a question may hold braces.
        return self.prompt.replace("{}", text)

    def complete(self, text: str, answer: str) -> str:
        """The same as a completed example, up to the next image."""
        return f"{self.ask(text)}{self.before_answer}{answer}{self.after_answer}"


# Where data lies and how many shots there are is no change of settings.
_PLACES = ("name", "data", "shot_data", "shots")


def _questions(name: str, *protocols: str, **options) -> TaskConfig:
    return TaskConfig(name, "question", protocols, **options)


def _captions(name: str, *protocols: str, **options) -> TaskConfig:
    # 64 tokens hold all but a few of COCO's captions. Nothing is cut: the paper cuts answers, not captions.
    options = {"prompt": "A picture of", "truncation": "none", "max_new_tokens": 64} | options
    return TaskConfig(name, "caption", protocols, **options)


# The quick start has learned no newline, and ends its texts itself. Its context of 128 holds three shots.
_OWN = {"after_answer": "", "truncation": "none", "overlong": "extrapolate"}

TASKS: MappingProxyType[str, TaskConfig] = MappingProxyType(
    {
        task.name: task
        for task in (
            _questions("vqav2", "vqa_official", "vqa_before_2021", "vqa_always_normalised"),
            _questions("okvqa", "okvqa_answer", "okvqa_raw_answer", "okvqa_stemmed"),
            _questions("gqa", "gqa_exact", "gqa_relaxed"),
            _questions("vizwiz", "vizwiz_by_index", "vizwiz_by_value"),
            # The paper's captions were scored by nlg-eval, which does not tokenise.
            _captions("coco", "coco_nlgeval", "coco"),
            _captions("nocaps", "nocaps_nlgeval", "nocaps"),
            # Question and class: as in configs/finetune_snli_ve.py, whose run says which output is which class.
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

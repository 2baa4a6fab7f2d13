"""Samples from the records of a dataset folder: choice of texts, and prompts.

A folder has one sample per record with captions, with a random caption as in the original, and one per question, with
the answer of a random annotator. Without a random generator, as in evaluation, the first caption and the most frequent
answer are used.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError, Question, Record, Sample

Texts = Literal["all", "captions", "questions"]

QUESTION = "question"
CAPTION = "caption"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Config of a dataset folder and its samples.

    Attributes:
        path: the folder.
        weight: sampling weight relative to the other folders of the split; None for its number of samples, so that all
            samples of a mixture are equally likely. Either all folders of a split have weights or none.
        texts: which texts of a record are used.
        caption_prompt: prompt before a caption; empty in pretraining, as in the original.
        question_prompt: prompt before an answer, with ``{}`` for the question (paper, section 4.1.1).
        words: replacements of answers, such as ``{"0": "no", "1": "yes"}``; other answers are unchanged.
        learn_prompt: whether the loss includes the prompt tokens. The original has no prompts: it learns every token of
            a text.
    """

    path: str
    weight: float | None = None
    texts: Texts = "all"
    caption_prompt: str = ""
    question_prompt: str = "Q: {} A:"
    words: dict[str, str] = dataclasses.field(default_factory=dict)
    learn_prompt: bool = True

    def __post_init__(self):
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"weight of {self.path} must be above 0, got {self.weight}")
        if self.question_prompt.count("{}") != 1:
            raise ValueError(f"question_prompt {self.question_prompt!r} must hold {{}} once, where the question goes")


# Reasons for skipping a sample, other than its image.
UNUSABLE = ("record damaged", "question without answers")


def sources_by_split(folders: Mapping[str, Sequence[SourceConfig | str]]) -> dict[str, tuple[SourceConfig, ...]]:
    """The folders of every split, paths as ``SourceConfig``.

    Raises:
        ValueError: some folders of a split have a weight and others have none.
    """
    sources = {
        split: tuple(SourceConfig(path=source) if isinstance(source, str) else source for source in members)
        for split, members in folders.items()
    }
    for split, members in sources.items():
        if len({source.weight is None for source in members}) > 1:
            raise ValueError(f"data.folders.{split}: give all of its folders a weight, or none")
    return sources


class UnusableSample(DataError):
    """Sample to skip and count, for one of the reasons ``UNUSABLE``."""


class FolderSamples:
    """Samples of a folder by number: captions first, then questions.

    ``samples[i]`` is the evaluation sample; ``draw`` chooses caption or answer at random.

    Args:
        records: the folder.
        source: config of the samples.
        first_row: number of its first image in ``data.batches.stored_images``.
    """

    def __init__(self, records: StoredRecords, source: SourceConfig, first_row: int):
        self._records, self.source, self._first_row = records, source, first_row
        captions, questions = np.asarray(records.texts).T
        self._captioned = np.flatnonzero(captions) if source.texts != "questions" else np.zeros(0, np.int64)
        self._question_ends = np.cumsum(questions if source.texts != "captions" else 0 * questions, dtype=np.int64)
        if not len(self):
            raise DataError(f"{source.path}: holds no {source.texts if source.texts != 'all' else 'texts'}")

    def __len__(self) -> int:
        return len(self._captioned) + (int(self._question_ends[-1]) if len(self._question_ends) else 0)

    def __getitem__(self, number: int) -> Sample:
        return self.draw(number, None)

    def draw(self, number: int, rng: np.random.Generator | None) -> Sample:
        """Sample with a caption or answer chosen by ``rng``.

        Raises:
            UnusableSample: a damaged record, or a question without answers.
        """
        row, question = self._locate(number)
        record = self._read(row)
        if question is None:
            prompt = self.source.caption_prompt
            text = record.captions[0 if rng is None else int(rng.integers(len(record.captions)))]
            return self._sample(row, prompt, f" {text}" if prompt else text, CAPTION)
        asked = record.questions[question]
        answer = _answer(asked, rng)
        prompt = self.source.question_prompt.replace("{}", asked.text)
        return self._sample(row, prompt, f" {self.source.words.get(answer, answer)}", QUESTION)

    def image(self, number: int) -> int:
        """Image number of a sample, also of an unusable one."""
        return self._first_row + self._locate(number)[0]

    def _sample(self, row: int, prompt: str, answer: str, kind: str) -> Sample:
        return Sample(self._first_row + row, prompt, answer, kind, self.source.learn_prompt)

    def _locate(self, number: int) -> tuple[int, int | None]:
        """Row of a sample's record, and index of its question; None for a caption."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        if number < len(self._captioned):
            return int(self._captioned[number]), None
        number -= len(self._captioned)
        row = int(np.searchsorted(self._question_ends, number, side="right"))
        return row, number - (int(self._question_ends[row - 1]) if row else 0)

    def _read(self, row: int) -> Record:
        try:
            return self._records.text(row)
        except (DataError, OSError, ValueError, RuntimeError) as error:  # the last two: the file library
            raise UnusableSample(UNUSABLE[0]) from error


class JoinedSamples(Sequence[Sample]):
    """Concatenated evaluation samples of several folders."""

    def __init__(self, members: Sequence[FolderSamples]):
        self.members = tuple(members)
        self._ends = np.cumsum([len(member) for member in members])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Sample:
        member, number = self.locate(number)
        return member[number]

    def locate(self, number: int) -> tuple[FolderSamples, int]:
        """Folder of a sample, and its number in the folder."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        member = int(np.searchsorted(self._ends, number, side="right"))
        return self.members[member], int(number - (self._ends[member - 1] if member else 0))


def _answer(question: Question, rng: np.random.Generator | None) -> str:
    answers = [answer for answer in question.answers if answer.strip()]
    if not answers:
        raise UnusableSample(UNUSABLE[1])
    if rng is not None:
        return answers[int(rng.integers(len(answers)))]
    return collections.Counter(answers).most_common(1)[0][0]

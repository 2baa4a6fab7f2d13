"""VQA accuracy as the official evaluation computes it, and other variants behind published numbers.

A question has several annotators' answers (usually ten). Agreement with three of the others scores 100. All results are
percentages, 0 to 100; the official program prints them with two decimals.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = ("a", "an", "the")

# English contractions the evaluation restores when one apostrophe is missing. Words that would collide with another
# (hell, ill, its, well, were) are not among them.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe() -> dict[str, str]:
    table = {"somebody'd": "somebodyd"}  # as in the official table
    for word in _CONTRACTIONS.split():
        for i, character in enumerate(word):
            if character == "'":
                table[word[:i] + word[i + 1 :]] = word
    return table


_RESTORED = _without_one_apostrophe()


def strip_punctuation(text: str) -> str:
    """The official first step: removes full stops, and removes most other marks or replaces them by a space.

    A mark is removed if it touches a space anywhere in ``text``, or if ``text`` has a comma between digits; otherwise
    it becomes a space. Full stops before a digit, and those after the first 32, are kept (both bugs of the original).
    """
    result = text
    grouped = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        loose = grouped or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if loose else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def normalize_words(text: str) -> str:
    """The official second step: lower case, number words to ten as digits, no articles, apostrophes restored."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_official(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy under the evaluation code of March 2021 and later.

    If all answers are equal nothing is normalised: ``Yes.`` scores 0 against ten times ``yes``. Otherwise both sides
    are normalised. Each annotator's answer is left out once, and matches with the rest are counted.
    """
    return _agreement(*_official_text(prediction, answers))


def vqa_always_normalised(prediction: str, answers: Sequence[str]) -> float:
    """As ``vqa_official`` with both sides normalised for every question."""
    return _agreement(_normalize(_clean(prediction)), [_normalize(_clean(answer)) for answer in answers])


def vqa_before_2021(prediction: str, answers: Sequence[str]) -> float:
    """The evaluation code before March 2021: predictions are always normalised.

    Answers that are not all equal lose their punctuation; case, articles and number words are kept.
    """
    answers = [_clean(answer) for answer in answers]
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    return _agreement(_normalize(_clean(prediction)), answers)


def vizwiz_by_value(prediction: str, answers: Sequence[str]) -> float:
    """The official program's result for answers without ids and with equal confidences, as in VizWiz.

    Leaving one annotator out then leaves out everyone with the same answer, so a unanimous answer scores 0. Use it only
    to compare with such numbers: ``vqa_official``, which leaves out by position, is the sensible reading.
    """
    prediction, answers = _official_text(prediction, answers)
    others = ([other for other in answers if other != answer] for answer in answers)
    return 100 * sum(min(1, rest.count(prediction) / 3) for rest in others) / len(answers)


def _official_text(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    prediction, answers = _clean(prediction), [_clean(answer) for answer in answers]
    if len(set(answers)) > 1:
        return _normalize(prediction), [_normalize(answer) for answer in answers]
    return prediction, answers


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normalize(text: str) -> str:
    return normalize_words(strip_punctuation(text))


def _agreement(prediction: str, answers: list[str]) -> float:
    """Mean over the annotators of min(1, matches among the others / 3), in percent."""
    matches = answers.count(prediction)
    others = (matches - (answer == prediction) for answer in answers)
    return 100 * sum(min(1, count / 3) for count in others) / len(answers)

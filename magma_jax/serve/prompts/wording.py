"""Classifies a chat message as a caption request or a question, and extracts the bare question.

Chat clients and evaluation harnesses write for instruction-following models ("Answer the question using a single word
or phrase."). A model that only knows ``Q: ... A:`` needs the bare question.
"""

import re

# Texts are untrusted and may be long, so every pattern here runs in linear time.
_LABEL = re.compile(r"(?:question|q)\s*:", re.IGNORECASE)
_ANSWER_LABEL = re.compile(r"\b(?:the (?:best )?answer is|answer|a) ?:$", re.IGNORECASE)
_AFTER_A_SENTENCE = re.compile(r"(?<=[.!?])\s+")
# Start of a sentence with instructions for the answer.
_ABOUT_THE_ANSWER = re.compile(
    r"""\W*(?:(?:please|kindly|just|only|simply|directly|briefly|now|first|try\s+to|based\s+on\s+the\s+image,?)\s+)*
    (?:answer|respond|reply|select|choose|pick|give|provide|output|return|write|use|keep|limit|think|explain
    |do\s+not|don't|note\s+that|your\s+(?:answer|response)|when\s+the\s+provided|let's|end|format|think\s+step)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_CAPTION = re.compile(r"\b(?:describe|description|caption)\b", re.IGNORECASE)
_CAN_YOU = re.compile(r"(?:can|could|would|will)\s+you\s+(?:please\s+)?(?:describe|caption)\b", re.IGNORECASE)


def is_worded(text: str) -> bool:
    """Whether a text already has the model's format: begins "A picture of", or begins with "Q:" and ends with "A:"."""
    text = text.strip()
    return text.startswith("A picture of") or (text.startswith("Q:") and text.endswith(" A:"))


def asks_for_caption(text: str) -> bool:
    """Whether a text asks for a caption.

    True for an empty text; for a text with "describe", "description" or "caption" and no question mark; and for a text
    that begins "Can you describe" or similar.
    """
    text = text.strip()
    if not text or _CAN_YOU.match(text):
        return True
    return "?" not in text and bool(_CAPTION.search(text))


def bare_question(text: str) -> str:
    """Extracts the question, on one line.

    Removes the labels "Question:" at the start and "Answer:" at the end, and sentences without a question mark that
    give instructions for the answer ("Answer with yes or no.", "Please respond briefly."), unless nothing else is left.
    """
    text = text.strip()
    if label := _LABEL.match(text):
        text = text[label.end() :]
    text = _ANSWER_LABEL.sub("", text)
    lines = [line.strip() for line in text.splitlines()]
    sentences = [sentence for line in lines for sentence in _AFTER_A_SENTENCE.split(line) if sentence]
    kept = [s for s in sentences if s.endswith("?") or not _ABOUT_THE_ANSWER.match(s)]
    return " ".join(kept or sentences)

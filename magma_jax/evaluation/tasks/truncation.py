"""Truncation of answers, since language models often continue past the answer."""

from collections.abc import Sequence

from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.evaluation.tasks.task import Truncation


def truncate(output: str, answers: Sequence[str], how: Truncation, tokenizer: Tokenizer) -> str:
    """``output`` without surrounding space, truncated as in ``TaskConfig.truncation``.

    "Length of the longest ground-truth answer" (paper, section 4.1.1) may mean words, tokens or characters. If the true
    answers are secret, the first line is kept.
    """
    text = output.strip()
    if how == "none":
        return text
    if how == "newline" or not answers:
        return text.split("\n", 1)[0].strip()
    if how == "words":
        return " ".join(text.split()[: max(len(answer.split()) for answer in answers)])
    if how == "characters":
        return text[: max(map(len, answers))].strip()
    # As in a prompt, the answer follows a space.
    longest = max(len(tokenizer.encode(f" {answer}")) for answer in answers)
    return tokenizer.decode(tokenizer.encode(f" {text}")[:longest]).strip()

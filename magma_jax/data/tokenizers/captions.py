"""Clean-ups of captions by name, as in MAGVLT: of given ones before they are encoded, of generated ones after."""

import re
from collections.abc import Callable


def pre_caption(caption: str) -> str:
    """Lower case, without leading marks, hyphens and slashes as spaces, runs of white space as one space.

    The original applies it to the captions of datasets, not to prompts.
    """
    caption = caption.lower().lstrip(",.!?*#:;~").replace("-", " ").replace("/", " ").replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", caption).rstrip("\n")


def generated_caption(caption: str) -> str:
    """``pre_caption`` without angle brackets, as in the original's evaluation branch."""
    return pre_caption(caption).replace("<", "").replace(">", "")


def first_sentence(caption: str) -> str:
    """``generated_caption`` up to the first full stop, without immediate repetitions of words, and " ." at the end.

    As in the original's main branch, which raises IndexError if no word is left; here the result is then empty.
    """
    words = generated_caption(caption).partition(".")[0].split()
    kept = [word for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
    return " ".join([*kept, "."]) if kept else ""


# Which of the last two the published scores were computed with is unknown.
CLEAN_UPS: dict[str, Callable[[str], str]] = {
    "none": str,
    "pre_caption": pre_caption,
    "post_caption": first_sentence,
    "post_caption_eval": generated_caption,
}

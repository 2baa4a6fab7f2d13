"""Text for the quick start's language model: captions and questions like those of `magma_jax.data.openmoji.drawings`.

A frozen language model that has never seen "dark skin tone" after a profession would assign every such caption a low
probability. So phrases are generated from parts in all combinations except the held-out ones, including many that no
drawing has ("a woman teapot with light skin tone"), and nothing marks which ones are drawn. Most lines begin with loose
words that the rest of the line uses: this teaches the model to repeat what precedes it, which is all that a prefix of
word-like vectors can require of a frozen model.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from magma_jax.data.openmoji.drawings import TONES, Drawing, questions

_FRAMES = ("A picture of {}", "A drawing of {}", "This is {}.", "It shows {}.", "There is {} here.")


def lines(images: Sequence[Drawing], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Returns about ``count`` lines of text, half captions and half questions with answers.

    A line is a pair: its leading loose words, if any, which are unpredictable, and the text to learn.

    ``images`` are all images. No line contains a held-out combination, neither in its caption nor in the words before
    a question.
    """
    rng = np.random.default_rng(seed)
    held_out = {(p.base, p.tones) for p in images if p.split != "train"}
    bases = {}
    for p in images:
        bases.setdefault(p.base, dataclasses.replace(p, tones=(), split="train"))
    groups = [
        [p for p in bases.values() if p.kind in kinds] for kinds in (("person", "hand", "body part"), ("people",))
    ]
    things, flags = ([p for p in bases.values() if p.kind == kind] for kind in ("thing", "flag"))

    def compose() -> Drawing:
        kind = rng.choice(5, p=(0.55, 0.15, 0.15, 0.11, 0.04))
        if kind == 2:
            made, gender = things[rng.integers(len(things))], str(rng.choice(["man", "woman", "person"]))
            made = dataclasses.replace(made, base=f"{gender} {made.base}", kind="person", gender=gender, people=1)
        else:
            group = {0: groups[0], 1: groups[1], 3: things, 4: flags}[int(kind)]
            made = group[rng.integers(len(group))]
        most = {"people": 2, "flag": 0, "thing": int(rng.random() < 0.2)}.get(made.kind, 1)
        number = most if rng.random() < 0.85 else int(rng.integers(most + 1))
        return dataclasses.replace(made, tones=tuple(str(t) for t in rng.choice(TONES, number, replace=False)))

    made: list[Drawing] = []
    while len(made) < count // 2:
        image = compose()
        if (image.base, image.tones) not in held_out:
            made.append(dataclasses.replace(image, index=len(made)))
    out = [(_words(p, rng), str(rng.choice(_FRAMES, p=(0.6, *[0.1] * 4))).format(p.caption)) for p in made]
    asked = questions(made, seed)
    for kind in sorted({q.kind for q in asked}):
        rows = [q for q in asked if q.kind == kind]
        # Kinds with many answers or a comparison need most training.
        for i in rng.permutation(len(rows))[: count // (6 if "what" in kind else 24)]:
            out.append((_words(made[rows[i].image], rng), rows[i].prompt + rows[i].answer))
    return [out[i] for i in rng.permutation(len(out))]


def _words(image: Drawing, rng: np.random.Generator) -> str:
    """Parts of an image as loose words in random order, some repeated; empty in one of ten cases."""
    if rng.random() < 0.1:
        return ""
    parts = [image.concept, image.kind, *([image.gender] if image.gender else [])]
    parts += [parts[i] for i in rng.integers(len(parts), size=rng.integers(3))]
    parts = [parts[i] for i in rng.permutation(len(parts))]
    # Only their order distinguishes the tones of two people.
    at = int(rng.integers(len(parts) + 1))
    return " ".join([*parts[:at], *image.tones, *parts[at:]]) + " "

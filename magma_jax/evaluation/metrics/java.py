"""METEOR and SPICE: Java programs that come with the package ``pycocoevalcap`` (extra ``java-metrics``).

Captions are tokenised as for the coco protocol. Both score an image from 0 to 1.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from magma_jax.data.format.records import DataError
from magma_jax.typing import Float

PACKAGE = "pycocoevalcap"
METEOR_JAR = "meteor-1.5.jar"
# SPICE's parser models; the package downloads them at first use.
CORENLP_JAR = "stanford-corenlp-3.6.0-models.jar"

# METEOR's parameters for English, tuned on human rankings: the paper, table 1.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_KINDS = (1.0, 0.6, 0.8, 0.6)


def meteor_counts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, "N 23"]:
    """METEOR 1.5's counts for each image against its closest reference; see ``meteor_of_counts``.

    Raises:
        DataError: Java or ``pycocoevalcap`` is missing, or the program ends early.
    """
    folder = _folder("METEOR") / "meteor"
    command = ["java", "-jar", "-Xmx2G", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = [
        " ||| ".join(["SCORE", *map(_clean, alternatives), _clean(hypothesis)])
        for hypothesis, alternatives in zip(hypotheses, references, strict=True)
    ]
    asked = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, cwd=folder, input=asked, capture_output=True, encoding="utf-8", check=False)
    counts = [line.split() for line in done.stdout.splitlines()]
    if len(counts) != len(lines) or any(len(row) != 23 for row in counts):
        reason = next(iter(done.stderr.splitlines()), "no output")
        raise DataError(f"{METEOR_JAR} in {folder} failed ({reason:.200})")
    rows = np.array(counts, np.float64).reshape(-1, 23)
    # METEOR counts a single chunk that covers both texts as zero fragments, also in sums.
    whole = (rows[:, 20] == 1) & (rows[:, 21:] == rows[:, :2]).all(1)
    rows[whole, 20] = 0
    return rows


def meteor_of_counts(counts: Float[np.ndarray, " 23"]) -> float:
    """METEOR 1.5 for English, 0 to 1, from one row of counts or the sum of several (Denkowski and Lavie 2014).

    The counts: length of hypothesis and reference, function words in each; for each of four kinds of match (exact,
    stem, synonym, paraphrase) content words and then function words matched, in hypothesis and reference; chunks, and
    all words matched in each.
    """
    lengths, functions, (chunks, *matched) = counts[:2], counts[2:4], counts[20:]
    by_kind = counts[4:20].reshape(4, 2, 2)  # kind, content or function, hypothesis or reference
    weighted = np.einsum("k,c,kcs->s", _KINDS, (_DELTA, 1 - _DELTA), by_kind)
    total = _DELTA * (lengths - functions) + (1 - _DELTA) * functions
    precision, recall = np.divide(weighted, total, out=np.zeros(2), where=total > 0)
    if not precision or not recall:
        return 0.0
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    return float(mean * (1 - _GAMMA * (chunks / np.mean(matched)) ** _BETA))


def spice(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " N"]:
    """SPICE of each image; the set's score is the mean (Anderson et al. 2016).

    Raises:
        DataError: Java, ``pycocoevalcap`` or the Stanford models are missing, or the program fails.
    """
    folder = _folder("SPICE") / "spice"
    if not (folder / "lib" / CORENLP_JAR).is_file():
        raise DataError(
            f"SPICE needs {CORENLP_JAR} in {folder / 'lib'}; fetch it once, with a network, by: "
            "python -c 'from pycocoevalcap.spice.get_stanford_models import get_stanford_models as g; g()'"
        )
    from pycocoevalcap.spice.spice import Spice  # pyright: ignore[reportMissingImports]  # of the extra java-metrics

    try:
        _, scores = Spice().compute_score(
            {i: list(alternatives) for i, alternatives in enumerate(references)},
            {i: [hypothesis] for i, hypothesis in enumerate(hypotheses)},
        )
    except (subprocess.CalledProcessError, OSError) as error:
        raise DataError(f"SPICE failed ({error}); it was written for Java 8") from None
    return np.array([score["All"]["f"] for score in scores])


def _folder(metric: str) -> Path:
    """The package's folder of a metric's program."""
    if shutil.which("java") is None:
        raise DataError(f"{metric} is a program in Java, and there is no `java` on this machine; install a runtime")
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"{metric} comes with {PACKAGE}: pip install 'magma_jax[java-metrics]'")
    return Path(next(iter(found.submodule_search_locations)))


def _clean(caption: str) -> str:
    """A caption without characters that separate entries in the line protocol."""
    return " ".join(caption.replace("|||", "").split())

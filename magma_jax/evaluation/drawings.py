"""Judges generated OpenMoji drawings by what their names say: which drawing, concept, skin tones, gender.

The judge shares nothing with a generator. Its figures must be read beside those of real drawings and of shuffled ones.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from magma_jax.data.openmoji.drawings import DEFAULT_TONE, Drawing, tones_of
from magma_jax.evaluation.features import Features
from magma_jax.typing import Bool, Float, Int, UInt8

# OpenMoji's skin colours by tone; hair and clothes have them too.
SKIN = {
    "light": (250, 220, 188),
    "medium-light": (222, 187, 144),
    "medium": (193, 154, 101),
    "medium-dark": (165, 121, 57),
    "dark": (106, 70, 47),
    DEFAULT_TONE: (252, 234, 43),
}
# Largest distance of a pixel to the colour that it counts for; the closest two colours are 43 apart.
NEAR = 20.0
# Of the probe: weight of the penalty, in units of the mean squared feature norm.
RIDGE = 1e-2


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says of drawings, each with the row of the drawing that it should be.

    Attributes:
        exact: whether the true drawing is the nearest of all.
        concept: whether the probe sees the true concept.
        tone: whether, of the real drawings of the same name in all tones, the one with the most similar counts of skin
            colours has the true tone; only drawings of one person or hand that exist in several tones count.
        two_tones: the same for both tones of two people, with counts of the left and the right half.
        gender: whether the nearest drawing has the true gender; only drawings that have one count.
    """

    exact: Bool[np.ndarray, " N"]
    concept: Bool[np.ndarray, " N"]
    tone: Bool[np.ndarray, " T"]
    two_tones: Bool[np.ndarray, " U"]
    gender: Bool[np.ndarray, " G"]

    def shares(self) -> dict[str, float]:
        """The share of right ones by name, without those that nothing counts for."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: float(right.mean()) for name, right in values.items() if len(right)}


class DrawingJudge:
    """Compares drawings with all real ones.

    Args:
        records: the real drawings, see ``data.openmoji.drawings.load``.
        images: their pixels.
        features: features of images for the probe of concepts.
    """

    def __init__(self, records: Sequence[Drawing], images: UInt8[np.ndarray, "N H W 3"], features: Features):
        self._records, self._features = records, features
        self._pixels = _flat(images)
        self._norms = np.square(self._pixels).sum(1)
        self._counts = np.stack([skin_counts(image) for image in images])
        self._variants: dict[tuple[str, int], list[int]] = defaultdict(list)
        for row, record in enumerate(records):
            self._variants[record.base, len(tones_of(record))].append(row)
        self._concepts = sorted({record.concept for record in records})
        self._mean, self._weights = self._probe(features(images))

    def nearest(self, images: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, " N"]:
        """Row of the real drawing at the smallest squared distance of pixels."""
        return np.argmin(self._norms - 2 * (_flat(images) @ self._pixels.T), axis=1)

    def concepts(self, images: UInt8[np.ndarray, "N H W 3"]) -> list[str]:
        """The concept of each drawing, by a linear probe on features."""
        scores = (self._features(images) - self._mean) @ self._weights
        return [self._concepts[i] for i in scores.argmax(1)]

    def judge(self, images: UInt8[np.ndarray, "N H W 3"], rows: Sequence[int] | Int[np.ndarray, " N"]) -> Verdict:
        """The verdict on drawings that should be those of ``rows``."""
        truth = [self._records[int(row)] for row in rows]
        nearest = self.nearest(images)
        by_tones: dict[int, list[bool]] = {0: [], 1: [], 2: []}
        for image, drawing in zip(images, truth, strict=True):
            variants = self._variants[drawing.base, len(tones_of(drawing))]
            if len(variants) > 1:
                distances = np.abs(self._counts[variants] - skin_counts(image)).sum(1)
                seen = self._records[variants[int(distances.argmin())]]
                by_tones[len(tones_of(drawing))].append(seen.tones == drawing.tones)
        concepts = zip(truth, self.concepts(images), strict=True)
        gendered = [i for i, drawing in enumerate(truth) if drawing.gender is not None]
        return Verdict(
            exact=nearest == np.asarray(rows),
            concept=np.array([drawing.concept == found for drawing, found in concepts], bool),
            tone=np.array(by_tones[1], bool),
            two_tones=np.array(by_tones[2], bool),
            gender=np.array([self._records[int(nearest[i])].gender == truth[i].gender for i in gendered], bool),
        )

    def _probe(self, features: Float[np.ndarray, "N C"]) -> tuple[Any, Any]:
        """Ridge regression from features to concepts, in its dual form since there are fewer drawings than features."""
        mean = features.mean(0)
        centred = (features - mean).astype(np.float64)
        gram = centred @ centred.T
        targets = np.zeros((len(features), len(self._concepts)))
        places = {concept: i for i, concept in enumerate(self._concepts)}
        targets[np.arange(len(features)), [places[record.concept] for record in self._records]] = 1
        penalty = RIDGE * np.trace(gram) / len(gram)
        solved = np.linalg.solve(gram + penalty * np.eye(len(gram)), targets - targets.mean(0))
        return mean, (centred.T @ solved).astype(np.float32)


def skin_counts(image: UInt8[np.ndarray, "H W 3"]) -> Int[np.ndarray, " 12"]:
    """Numbers of pixels near each skin colour, in the left half and in the right half."""
    pixels = image.astype(np.float32)[..., None, :]
    distances = np.sqrt(np.square(pixels - np.array(list(SKIN.values()), np.float32)).sum(-1))
    nearest = np.where(distances.min(-1) <= NEAR, distances.argmin(-1), len(SKIN))
    halves = np.array_split(nearest, 2, axis=1)
    return np.concatenate([np.bincount(half.ravel(), minlength=len(SKIN) + 1)[: len(SKIN)] for half in halves])


def _flat(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N C"]:
    return images.reshape(len(images), -1).astype(np.float32)

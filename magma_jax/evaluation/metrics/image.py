"""Image metrics on features: Fréchet distance, Inception score, precision and recall.

They take the features or class probabilities of any network, and a result must name the network: only with the official
Inception weights are they FID and IS. Formulas are those of torch-fidelity, in fp64.
"""

from typing import NamedTuple

import numpy as np

from magma_jax.typing import Float

# Distances held at a time.
BLOCK = 1024


class Statistics(NamedTuple):
    """Mean (C,) and covariance (C, C) of features, fp64."""

    mean: np.ndarray
    covariance: np.ndarray


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Share of generated images near real ones, and of real images near generated ones."""

    precision: float
    recall: float


def feature_statistics(features: Float[np.ndarray, "N C"]) -> Statistics:
    """Mean and unbiased covariance.

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs the features of at least two images, got {len(features)}")
    features = features.astype(np.float64)
    return Statistics(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared Fréchet distance of two Gaussians (Heusel et al., 2017): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Raises:
        ValueError: features of different widths.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of widths {len(first.mean)} and {len(second.mean)} cannot be compared")
    difference = first.mean - second.mean
    # The trace of a product's root is the sum of the roots of its eigenvalues, which are real and not negative.
    eigenvalues = np.linalg.eigvals(first.covariance @ second.covariance)
    root = np.real(np.sqrt(eigenvalues.astype(np.complex128))).sum()
    return float(difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * root)


def inception_score(
    probabilities: Float[np.ndarray, "N C"], splits: int = 10, seed: int | None = 2020
) -> InceptionScore:
    """Exponential of the mean divergence of each image's classes from the average image's (Salimans et al., 2016).

    Args:
        probabilities: of classes, by image.
        splits: parts that are scored apart.
        seed: images are shuffled with it first, as torch-fidelity does; None for their order.

    Raises:
        ValueError: fewer images than splits, or rows that do not add up to 1.
    """
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"{len(probabilities)} images cannot be split into {splits} parts")
    probabilities = probabilities.astype(np.float64)
    if not np.allclose(probabilities.sum(1), 1, atol=1e-3) or probabilities.min() < 0:
        raise ValueError("probabilities of each image must not be negative and add up to 1")
    if seed is not None:
        probabilities = probabilities[np.random.RandomState(seed).permutation(len(probabilities))]
    scores = []
    for i in range(splits):
        part = probabilities[i * len(probabilities) // splits : (i + 1) * len(probabilities) // splits]
        mean = part.mean(0, keepdims=True)
        # x log x is 0 at 0, as its limit.
        safe = np.maximum(part, np.finfo(np.float64).tiny)
        divergence = np.where(part > 0, part * (np.log(safe) - np.log(np.maximum(mean, np.finfo(np.float64).tiny))), 0)
        scores.append(np.exp(divergence.sum(1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(
    real: Float[np.ndarray, "N C"], generated: Float[np.ndarray, "M D"], neighbours: int = 3
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    A point is near a set if it is within the distance from one of its points to that point's k-th neighbour in the set.

    Raises:
        ValueError: features of different widths, or a set with no more than ``neighbours`` images.
    """
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"features of widths {real.shape[1]} and {generated.shape[1]} cannot be compared")
    if min(len(real), len(generated)) <= neighbours or neighbours < 1:
        raise ValueError(
            f"the neighbour {neighbours} needs more images of each kind, got {len(real)} and {len(generated)}"
        )
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    return PrecisionRecall(
        precision=_share_near(generated, real, neighbours), recall=_share_near(real, generated, neighbours)
    )


def _share_near(points: np.ndarray, others: np.ndarray, neighbours: int) -> float:
    # The nearest of a set's own points is itself.
    radii = np.concatenate([np.partition(block, neighbours, 1)[:, neighbours] for block in _distances(others, others)])
    near = [(block <= radii).any(1) for block in _distances(points, others)]
    return float(np.concatenate(near).mean())


def _distances(points: np.ndarray, others: np.ndarray):
    """Distances of blocks of points to all others."""
    norms = np.square(others).sum(1)
    for start in range(0, len(points), BLOCK):
        block = points[start : start + BLOCK]
        yield np.sqrt(np.maximum(np.square(block).sum(1)[:, None] + norms - 2 * block @ others.T, 0))

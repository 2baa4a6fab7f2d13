"""Image metrics equal torch-fidelity 0.4.0 on given features; the judge of drawings is right on real ones."""

from pathlib import Path

import numpy as np
import pytest

from magma_jax.data.openmoji import drawings
from magma_jax.evaluation.drawings import DrawingJudge, skin_counts
from magma_jax.evaluation.features import efficientnet_features
from magma_jax.evaluation.metrics.image import feature_statistics, frechet_distance, inception_score, precision_recall


@pytest.fixture(scope="module")
def features():
    """The features that torch-fidelity was run on."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(400, 32)).astype(np.float32) @ rng.normal(size=(32, 32)).astype(np.float32)
    second = (rng.normal(size=(300, 32)) + 0.3).astype(np.float32)
    few = rng.normal(size=(20, 32)).astype(np.float32)
    logits = (rng.normal(size=(203, 10)).astype(np.float32) * 3).astype(np.float64)
    narrow = rng.normal(size=(260, 32)).astype(np.float32) * 0.8
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return first, second, few, probabilities, narrow.astype(np.float32)


def test_frechet_distance(features):
    """Also with fewer images than features, whose covariance is singular."""
    first, second, few, *_ = map(feature_statistics, (*features[:3],))
    assert frechet_distance(first, second) == pytest.approx(801.8638317162348, rel=1e-9)
    assert frechet_distance(few, second) == pytest.approx(23.408560812147236, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="features of widths 32 and 3 cannot be compared"):
        frechet_distance(first, feature_statistics(np.eye(3, dtype=np.float32)))
    with pytest.raises(ValueError, match="at least two images, got 1"):
        feature_statistics(features[0][:1])


@pytest.mark.parametrize(
    ("splits", "seed", "mean", "std"),
    [
        (10, 2020, 3.5416604034256522, 0.2264045767385767),
        (3, 2020, 3.846607150157315, 0.10441507677640588),
        (10, None, 3.5449860248848593, 0.5103660208884935),
    ],
)
def test_inception_score(features, splits, seed, mean, std):
    score = inception_score(features[3], splits, seed)
    assert score.mean == pytest.approx(mean, rel=1e-9)
    assert score.std == pytest.approx(std, rel=1e-9)


def test_the_range_of_inception_scores():
    """From 1, all images alike, to the number of classes, each certain and all equally frequent; zeros are allowed."""
    certain = np.eye(4)[np.arange(40) % 4]
    assert inception_score(certain, 1).mean == pytest.approx(4)
    assert inception_score(np.full((40, 4), 0.25), 2).mean == pytest.approx(1)
    with pytest.raises(ValueError, match="3 images cannot be split into 10 parts"):
        inception_score(certain[:3])
    with pytest.raises(ValueError, match="add up to 1"):
        inception_score(certain * 2, 1)


def test_precision_and_recall(features):
    second, narrow = features[1], features[4]
    found = precision_recall(real=narrow, generated=second)
    assert found.precision == pytest.approx(0.14666666090488434, abs=1e-6)
    assert found.recall == pytest.approx(0.9384615421295166, abs=1e-6)
    assert precision_recall(second, second) == (1, 1)
    with pytest.raises(ValueError, match="the neighbour 3 needs more images of each kind, got 3 and 300"):
        precision_recall(narrow[:3], second)
    with pytest.raises(ValueError, match="widths 32 and 4"):
        precision_recall(narrow, second[:, :4])


SIZE = 32


@pytest.fixture(scope="module")
def some():
    """People, hands and things, all tones of each: 32 pixels a side, from the cache that other tests fill."""
    records, images = drawings.load(Path("~/.cache/magma_jax").expanduser(), SIZE)
    bases = [*dict.fromkeys(record.base for record in records if len(record.tones) == 2)][:2]
    bases += [*dict.fromkeys(record.base for record in records if len(record.tones) == 1)][:12]
    bases += [*dict.fromkeys(record.base for record in records if record.kind in ("thing", "flag"))][:20]
    rows = [record.index for record in records if record.base in bases]
    return [records[row] for row in rows], images[rows]


def small(images):
    """Features without a network: means of 4 x 4 pixels."""
    side = images.shape[1] // 4
    return images.reshape(len(images), side, 4, side, 4, 3).mean((2, 4)).reshape(len(images), -1).astype(np.float32)


def test_the_judge_is_right_on_real_drawings(some):
    records, images = some
    judge = DrawingJudge(records, images, small)
    rows = np.arange(len(records))
    shares = judge.judge(images, rows).shares()
    assert shares == {"exact": 1, "concept": 1, "tone": 1, "two_tones": 1, "gender": 1}

    # A little noise changes nothing; other drawings are wrong.
    noise = np.random.default_rng(0).integers(-6, 7, images.shape)
    noisy = np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)
    shares = judge.judge(noisy, rows).shares()
    assert min(shares[name] for name in ("exact", "tone", "two_tones", "gender")) > 0.95
    shuffled = np.random.default_rng(1).permutation(rows)
    shuffled = np.where(shuffled == rows, np.roll(shuffled, 1), shuffled)
    shares = judge.judge(images[shuffled], rows).shares()
    assert shares["exact"] == 0
    assert shares["concept"] < 0.2
    assert shares["tone"] < 0.5

    # What nothing counts for has no share.
    flag = [i for i, record in enumerate(records) if record.kind == "flag"][:1]
    assert judge.judge(images[flag], flag).shares().keys() == {"exact", "concept"}


def test_skin_colours_are_counted_by_half():
    image = np.full((8, 8, 3), 255, np.uint8)
    image[:2, :4] = (250, 220, 188)
    image[:, 6:] = (100, 75, 50)
    counts = skin_counts(image)
    assert counts[:6].tolist() == [8, 0, 0, 0, 0, 0]
    assert counts[6:].tolist() == [0, 0, 0, 0, 16, 0]


def test_features_need_square_images():
    with pytest.raises(ValueError, match="images of 32 x 64 pixels: the sides must be equal and a multiple of 32"):
        efficientnet_features(np.zeros((1, 32, 64, 3), np.uint8))

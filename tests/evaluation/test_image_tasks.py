"""Tasks of images: sets are compared, every result says how it was drawn; captions of models without prompts."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from magma_jax.config import ConfigError
from magma_jax.data.format.records import DataError
from magma_jax.evaluation.command import configure_images
from magma_jax.evaluation.images import drawing, inception, nets
from magma_jax.evaluation.images.nets import ImageNet, Seen, efficientnet
from magma_jax.evaluation.images.task import IMAGE_TASKS, ImageTaskConfig
from magma_jax.evaluation.results.provenance import stamp
from magma_jax.evaluation.tasks.describing import describe_task
from magma_jax.evaluation.tasks.task import TASKS
from magma_jax.inference.answers import Answer, ImageOptions
from tests.evaluation.conftest import DATA
from tests.fixtures import make_inception_golden


class Toy:
    """Draws the colour of a text's length, and describes every image alike."""

    makes = frozenset({"text", "image"})
    image_size, image_tokens, tokenizer, classes = 16, 4, DATA.tokenizer, 0

    def answers(self, prompts, options, *, count=None):
        self.options = options
        for (part,) in prompts:
            if isinstance(options, ImageOptions):
                image = Image.new("RGB", (16, 16), (len(part) * 9 % 256, 5, 200))
                yield [Answer(parts=(image,), tokens=(), logprob=0.0, finish="stop")]
            else:
                assert part.load().size == (16, 16)
                yield [Answer(parts=("a square",), tokens=(1,), logprob=0.0, finish="stop")]

    def text_tokens(self, text):
        return 1

    def canvases(self, prompt, options, *, previews=0):
        return iter(())

    def sampler(self, options):
        return {"sampler": "toy", "steps": 1, "guidance": f"u + s (c - u), s = {options.guidance:g}"}

    def warm_up(self, rows):
        pass


def colours(images):
    """Mean colours of the four quarters, and two classes."""
    features = images.reshape(len(images), 2, images.shape[1] // 2, 2, -1, 3).mean((2, 4)).reshape(len(images), -1)
    share = images.reshape(len(images), -1).mean(1) / 255
    return Seen(features, np.stack([share, 1 - share], 1))


@pytest.fixture
def net(monkeypatch):
    monkeypatch.setattr(drawing, "_net", lambda task: ImageNet("colours", colours))


def arguments(*settings, data=(), limit=None, split="test"):
    return argparse.Namespace(set=list(settings), data=list(data), limit=limit, split=split)


def test_drawings_are_compared_and_the_result_says_how_they_were_made(net, folders, tmp_path):
    task = configure_images(
        "coco_30k", arguments("splits=2", "guidance=2", "candidates=3", data=[f"coco_30k={folders / 'val'}"], limit=5)
    )
    result = drawing.draw_task(Toy(), task, stamp={"checkpoint": {"name": "toy"}})
    path = drawing.write_image_result(tmp_path, result)
    assert path.name.startswith("coco_30k-limit=5-splits=2-candidates=3-guidance=2.0-")
    found = json.loads(path.read_text())
    assert (found["n"], found["of"], found["net"]) == (5, 6, "colours")
    assert found["sampler"] == {"sampler": "toy", "steps": 1, "guidance": "u + s (c - u), s = 2"}
    assert found["re-ranking"] == "best of 3 by the model's own likelihood of the caption"
    assert found["resize"].endswith("drawings of 16: bicubic to 256")
    assert set(found["scores"]) >= {"colours_frechet_distance", "colours_score", "colours_precision"}
    assert found["scores"]["colours_frechet_distance"] > 100
    assert "toy" in result.table()


def test_a_clip_scores_the_drawings_and_chooses_them(net, folders, monkeypatch):
    """The score is of the drawings as they are compared; negative cosines count as 0."""
    seen = []

    class Scorer:
        name = "toy clip"

        def __init__(self, path):
            assert path == "clip.pt"

        def __call__(self, images, texts):
            seen.extend(zip(images, texts, strict=True))
            return np.array([-0.5, *[0.3] * (len(texts) - 1)], np.float32)

    monkeypatch.setattr(drawing, "ClipScorer", Scorer)
    settings = ["splits=2", "candidates=2", "clip=clip.pt", "rerank=clip", f"data={folders / 'val'}"]
    task = configure_images("coco_30k", arguments(*settings, limit=5))
    model = Toy()
    result = drawing.draw_task(model, task)
    assert result.scores["clip_score"] == pytest.approx(100 * 0.3 * 4 / 5)
    assert (result.stamp["clip"], result.stamp["re-ranking"]) == ("toy clip", "best of 2 by the CLIP score")
    assert isinstance(model.options.score, Scorer)
    assert [image.size for image, _ in seen] == [(256, 256)] * 5
    assert len({text for _, text in seen}) == 5


def test_a_set_equals_itself():
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
    scores = drawing.compare(colours(images), colours(images), "inception-2015-12-05", splits=2)
    # Variances of colours are thousands.
    assert scores["fid"] == pytest.approx(0, abs=1e-3)
    assert scores["inception_score"] == scores["inception_score_of_real_images"]
    assert scores["inception-2015-12-05_precision"] == 1


@pytest.mark.slow
def test_efficientnet_knows_classes_of_imagenet():
    net = efficientnet(64)
    seen = net.look(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8))
    assert (net.name, seen.features.shape, seen.probabilities.shape) == ("efficientnet_lite0", (3, 1280), (3, 1000))
    np.testing.assert_allclose(seen.probabilities.sum(1), 1, rtol=1e-5)


def test_captions_of_a_model_without_prompts(folders):
    task = dataclasses.replace(TASKS["coco"], data=str(folders / "val"), limit=4)
    result = describe_task(Toy(), task, stamp={"checkpoint": {"name": "toy"}})
    assert result.outputs == ["a square"] * 4
    assert result.task.prompt == ""
    assert result.scores["coco"].samples == 4
    assert "decoding    the family's own sampler, seed 0" in stamp(result.to_dict())
    for changes in ({"shots": 1}, {"kind": "question", "prompt": "{}"}):
        with pytest.raises(DataError, match="this model describes images, without shots; take a caption task"):
            describe_task(Toy(), dataclasses.replace(task, **changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["limit=1"], "limit must be at least 2"),
        (["image_size=100"], "image_size must be a multiple of 32, got 100"),
        (["candidates=0"], "candidates must be at least 1"),
        (["rerank=clip"], "rerank clip needs the file of a CLIP: set clip"),
        (["name=x"], "the task's name stays coco_30k"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        configure_images("coco_30k", arguments(*settings))


def test_refused_tasks(net, folders):
    task = dataclasses.replace(IMAGE_TASKS["coco_30k"], data=str(folders / "val"))
    with pytest.raises(DataError, match="6 captions are too few to compare sets; it takes 10"):
        drawing.draw_task(Toy(), task)
    writer = Toy()
    writer.makes = frozenset({"text"})
    with pytest.raises(DataError, match="this model draws no images"):
        drawing.draw_task(writer, task)
    with pytest.raises(DataError, match="no data; give the dataset folder with --data"):
        drawing.draw_task(Toy(), ImageTaskConfig("own_drawings"))


@pytest.mark.slow
def test_inception_equals_torch_fidelity(golden, tmp_path):
    """On seeded weights, read from a file; compiling takes ten seconds."""
    with np.load(golden / "inception.npz") as file:
        arrays = dict(file)
    names = inception.convolutions()
    tensors = make_inception_golden.seeded(names, arrays["shapes"].tolist())
    torch = pytest.importorskip("torch")
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"its SHA-256 begins with [0-9a-f]{8}, that of pt_inception-2015-12-05"):
        inception.read_inception(tmp_path / "weights.pth")
    weights = inception.read_inception(tmp_path / "weights.pth", "")
    features, probabilities = inception.look(weights, make_inception_golden.image())
    np.testing.assert_allclose(features, arrays["features"], atol=2e-4)
    # The seeded classifier's logits are large, so that features' rounding shows in two probabilities of a half.
    np.testing.assert_allclose(probabilities, arrays["probabilities"], atol=5e-5)


def test_official_weights_that_are_missing(net, tmp_path):
    with pytest.raises(ValueError, match=r"no such file\. FID takes .*\.pth \(its SHA-256 begins with 6726825d"):
        nets.inception(str(tmp_path / "absent.pth"))
    assert len(inception.convolutions()) == 94
    with pytest.raises(ValueError, match="net inception needs its file: set weights"):
        ImageTaskConfig("coco_30k", net="inception")
    with pytest.raises(ValueError, match="weights: efficientnet_lite0 has those of an installed package"):
        ImageTaskConfig("coco_30k", weights="x.pth")

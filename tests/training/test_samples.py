"""Samples in the run: which are chosen, and what is left of them."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from magma_jax.data.format.records import Sample
from magma_jax.families.magma import MAGMA
from magma_jax.families.magma.panel import choose
from magma_jax.runtime.sharding import MeshConfig
from magma_jax.training import loop
from magma_jax.training.monitor.writers import WatchConfig
from magma_jax.training.run import setup
from tests import tiny
from tests.training import events

EVERY_TWO = WatchConfig(samples_every=2, samples=3, samples_split="test", samples_tokens=6)


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    monkeypatch.setattr(setup, "load_dataset", lambda config: tiny.dataset())


def test_images_are_spread_and_kinds_go_round():
    samples = []
    for row in range(10):
        samples += [Sample(row, "A picture of", f" thing {row}", "caption")] * (row != 9)
        samples += [Sample(row, f"Q: {kind}? A:", " yes", kind) for kind in ("colour", "size")]
    chosen = choose(samples, 5)
    assert [(sample.image, sample.kind) for sample in chosen] == [
        (0, "caption"),
        (0, "colour"),
        (2, "caption"),
        (2, "size"),
        (4, "caption"),
        (4, "colour"),
        (6, "caption"),
        (6, "size"),
        (8, "caption"),
        (8, "colour"),
    ]
    assert {sample.image for sample in choose(samples, 99)} == set(range(10))


def test_a_run_leaves_images_and_lines(tmp_path):
    config = tiny.run_config(watch=EVERY_TWO)
    groups = {**config.optim.groups, "encoder": "frozen"}
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, groups=groups))
    # Four devices share the six samples.
    run = loop.train(MAGMA, dataclasses.replace(config, mesh=MeshConfig(data=4)), tmp_path / "run", jax.devices()[:4])
    assert sorted(path.name for path in (run.workdir / "samples").iterdir()) == ["000002.png", "000004.png"]
    lines = [json.loads(line) for line in (run.workdir / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] * 6 + [4] * 6
    assert {(line["picture"], line["kind"]) for line in lines} == {
        (row, kind) for row in (0, 1, 2) for kind in ("caption", "colour")
    }
    assert all(line["said"] and line["truth"] for line in lines)
    file = events.images(run.workdir / "tensorboard")["samples"][4]
    shown = np.asarray(Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(shown, np.asarray(Image.open(run.workdir / "samples" / "000004.png")))
    assert shown.shape[1] == 1200
    # The first card shows the first image: a red square.
    np.testing.assert_array_equal(shown[60, 150], tiny.COLOURS["red"])

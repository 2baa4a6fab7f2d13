"""What was written is read back: JSON lines, event files, and the calls that Weights & Biases gets."""

import io
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from magma_jax.config import ConfigError
from magma_jax.training.monitor.writers import JsonLines, TensorBoard, Wandb, append_line, cut_after, read_lines, tag
from tests.training import events


def test_json_lines_keep_fp32_apart(tmp_path):
    values = [float(np.float32(value)) for value in (0.1, 1 / 3, 5.505319118499756, 1e-8)]
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    for step, value in enumerate(values, 1):
        lines.scalars(step, {"loss": value})
    read, unreadable = read_lines(tmp_path / "metrics.jsonl")
    assert [np.float32(line["loss"]) for line in read] == [np.float32(value) for value in values]
    assert unreadable == 0


def test_steps_after_the_checkpoint_and_half_lines_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "seconds": step * 2.0, "loss": 1.0}) for step in (10, 20, 30, 40)]
    path.write_text("\n".join(lines) + '\n{"step": 50, "lo')
    writer = JsonLines(path, 20)
    assert writer.last == {"step": 20, "seconds": 40.0, "loss": 1.0}
    writer.scalars(30, {"loss": 0.5})
    assert [(line["step"], line["loss"]) for line in read_lines(path)[0]] == [(10, 1.0), (20, 1.0), (30, 0.5)]
    assert len(path.read_text().splitlines()) == 3


def test_a_file_without_later_steps_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_after(path, 5) == {}
    path.write_text('{"step": 5}\n')
    before = path.stat()
    assert cut_after(path, 5) == {"step": 5}
    assert path.stat().st_ino == before.st_ino


def test_odd_spaces_in_an_answer_end_no_line(tmp_path):
    """They stand in a file of samples as they are, and its lines stay whole when a run goes on."""
    path = tmp_path / "samples.jsonl"
    for step in (5, 6, 7):
        append_line(path, {"step": step, "answer": "one\u2028two\x85three"})
    assert cut_after(path, 6) == {"step": 6, "answer": "one\u2028two\x85three"}
    lines, unreadable = read_lines(path)
    assert ([line["step"] for line in lines], unreadable) == ([5, 6], 0)


def test_lines_of_one_step_are_joined_on_reading(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5, "loss": 2}\n{"step": 5, "validation_loss": 3}\nnonsense\n{"loss": 1}\n')
    assert read_lines(path) == ([{"step": 5, "loss": 2, "validation_loss": 3}], 2)


def test_event_files_hold_figures_and_images(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    writer = TensorBoard(tmp_path, 0)
    writer.scalars(20, {"loss": 1.5, "samples_per_second": 100.0})
    writer.image(20, "samples", image)
    writer.close()
    assert events.scalars(tmp_path) == {"train/loss": {20: 1.5}, "speed/samples_per_second": {20: 100.0}}
    file = events.images(tmp_path)["samples"][20]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), image)


def test_a_resumed_run_purges_later_steps_in_tensorboard(tmp_path):
    for after, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        writer = TensorBoard(tmp_path, after)
        for step in steps:
            writer.scalars(step, {"loss": float(after + step)})
        writer.close()
    assert events.scalars(tmp_path)["train/loss"] == {10: 10.0, 20: 20.0, 30: 50.0, 40: 60.0}
    starts = [event.step for event in events.read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [21]


def test_groups_of_figures():
    assert [tag(name) for name in ("loss", "mfu", "validation_loss")] == ["train/loss", "speed/mfu", "validation/loss"]


class FakeWandb(types.ModuleType):
    """Keeps what it is called with."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.finished = [], [], 0
        self.Image = lambda pixels: ("image", pixels.shape)

    def init(self, **options):
        self.runs.append(options)
        return self

    def define_metric(self, *names, **options):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_weights_and_biases(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    workdir = tmp_path / "red squares"
    workdir.mkdir()
    for _ in range(2):
        writer = Wandb(workdir, "squares", {"steps": 4})
        writer.scalars(10, {"loss": 1.5})
        writer.image(10, "samples", np.zeros((2, 3, 3), np.uint8))
        writer.close()
    first, second = fake.runs
    assert first == second  # the same id: the second part goes on in the same run
    assert (first["project"], first["name"], first["resume"]) == ("squares", "red squares", "allow")
    assert first["config"] == {"steps": 4}
    assert fake.logged[:2] == [{"step": 10, "train/loss": 1.5}, {"step": 10, "samples": ("image", (2, 3, 3))}]
    assert fake.finished == 2


def test_a_missing_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"watch\.wandb needs another package: pip install wandb"):
        Wandb(tmp_path, "squares", {})

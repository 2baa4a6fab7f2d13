"""A run folder on a mounted bucket: whether checkpoints can be finished there is found out before training."""

import errno
import os
from pathlib import Path

import pytest

from magma_jax.storage.model_folder import CheckpointError
from magma_jax.training.run import mounted
from magma_jax.training.run.mounted import filesystem_type, rename_problem
from tests import tiny

MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
40 22 0:50 / {folder} rw,nosuid - fuse.gcsfuse bucket rw
41 22 0:51 / {folder}/a\\040disk rw - nfs4 host:/disk rw
"""


@pytest.fixture
def mount(tmp_path, monkeypatch):
    """A folder that looks like a bucket mounted with Cloud Storage FUSE."""
    folder = tmp_path / "shared"
    (folder / "a disk").mkdir(parents=True)
    (tmp_path / "mounts").write_text(MOUNTS.format(folder=folder.resolve()))
    monkeypatch.setattr(mounted, "_MOUNTS", tmp_path / "mounts")
    return folder


@pytest.fixture
def flat(monkeypatch):
    """Folders that hold files cannot be renamed."""

    def rename(source, target):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(source))

    monkeypatch.setattr(mounted.os, "rename", rename)


def test_the_file_system_of_a_folder(mount, tmp_path):
    found = [filesystem_type(folder) for folder in (mount, mount / "a disk", tmp_path, Path("/"))]
    assert found == ["fuse.gcsfuse", "nfs4", "ext4", "ext4"]


def test_a_bucket_that_renames_folders_will_do(mount):
    assert rename_problem(mount / "runs/a") is None
    assert [path.name for path in mount.iterdir()] == ["a disk"]


@pytest.mark.usefixtures("flat")
def test_a_flat_bucket_is_refused_before_training(mount, tmp_path):
    with pytest.raises(CheckpointError) as raised:
        tiny.train(tiny.run_config(), mount / "runs/a")
    said = str(raised.value)
    assert said.startswith(f"{mount}/runs/a: a folder that holds files cannot be renamed here (Too many open files)")
    assert all(remedy in said for remedy in ("--enable-hierarchical-namespace", "--rename-dir-limit", "gs://"))
    assert "\n" not in said
    assert [path.name for path in mount.iterdir()] == ["a disk"]
    assert rename_problem(mount / "a disk/run") is None  # not a bucket: not tried

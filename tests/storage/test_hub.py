"""Downloads against a server that speaks the hub's protocol: whole or not at all, continued, one line of error."""

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import httpx2
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from magma_jax.storage import hub as hub_module
from magma_jax.storage.hub import HubError, fetch, local_path, settings_folder
from tests.storage.hub_server import COMMIT, Hub, serve

CONTENT = np.random.default_rng(0).bytes(300_000)
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
FILES = {
    "owner/model": {
        **{"weights.pt": CONTENT, "config.json": b"{}", "README.md": b"text"},
        **dict.fromkeys(("generation_config.json", "vocab.json", "merges.txt", "chat_template.jinja"), b"{}"),
    },
    "owner/shards": {
        "model.safetensors.index.json": INDEX,
        "model-1.safetensors": CONTENT[:5000],
        "model-2.safetensors": CONTENT[5000:10000],
        "pytorch_model.bin": CONTENT,
        **dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "vocab.json"), b"{}"),
    },
    "owner/two": {"a.pt": b"a", "b.pt": b"b"},
    "owner/none": {"README.md": b"text"},
    "owner/export": {"model.safetensors": CONTENT, "model.json": b"{}"},
    "owner/lost": {"model.safetensors.index.json": INDEX},
}
ADDRESS = "hf://owner/model/weights.pt"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server, and the library set to it with an empty cache and no waiting between attempts."""
    with serve(Hub(FILES)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        close_session()
        yield hub
        close_session()


def test_an_exported_folder_is_fetched_as_a_folder(hub):
    refused("hf://owner/export", "hf download owner/export --local-dir NAME")


def refused(address, *words):
    with pytest.raises(HubError) as error:
        fetch(address)
    message = str(error.value)
    assert message.startswith(address)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def blobs(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache/models--owner--model/blobs").iterdir())


def test_fetches_a_file_once(hub, tmp_path, capsys):
    path = fetch(ADDRESS)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache/models--owner--model/snapshots" / COMMIT)
    assert f"fetching {ADDRESS} (300.0 kB)" in capsys.readouterr().err
    assert fetch(ADDRESS) == path
    assert len(hub.downloads("weights.pt")) == 2  # the address and where it leads
    assert blobs(tmp_path) == [hashlib.sha256(CONTENT).hexdigest()]


def test_a_path_is_a_path(tmp_path):
    assert local_path(tmp_path / "x.pt") == tmp_path / "x.pt"
    assert local_path("runs/x") == Path("runs/x")


def test_chooses_weights_and_settings(hub):
    folder = settings_folder("hf://owner/model")
    names = ["chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "vocab.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert not hub.downloads("weights.pt")
    assert fetch("hf://owner/model@float16").name == "weights.pt"
    assert (fetch("hf://owner/model").parent / "config.json").read_bytes() == b"{}"
    index = fetch("hf://owner/shards")
    assert index.name == "model.safetensors.index.json"
    assert (index.parent / "model-2.safetensors").read_bytes() == CONTENT[5000:10000]
    assert (index.parent / "tokenizer_config.json").exists()
    assert not hub.downloads("pytorch_model.bin")
    assert not hub.downloads("shards/resolve/main/vocab.json")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hf://owner/shards", "the repository has no config.json, in which the model's sizes stand"),
        ("hf://owner/model/weights.pt", "names one file; give the repository, hf://owner/model"),
        ("hf://owner/absent", "no such repository"),
    ],
)
def test_settings_that_are_not_there(hub, address, says):
    with pytest.raises(HubError, match=f"^{address}: .*{says}"):
        settings_folder(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://owner/absent", ["no such repository", "HF_TOKEN"]),
        ("hf://owner/absent/x.pt", ["no such repository"]),
        ("hf://owner/model/absent.pt", ["no such file"]),
        ("hf://owner/model@absent/weights.pt", ["no such revision"]),
        ("hf://owner/two", ["several (a.pt, b.pt)", "add /FILE"]),
        ("hf://owner/none", ["none among README.md"]),
        ("hf://owner", ["not a hub address"]),
        ("hf://datasets/owner/model", ["only models"]),
    ],
)
def test_what_is_not_there(hub, address, words):
    refused(address, *words)


def test_an_index_of_shards_that_are_not_there(hub):
    with pytest.raises(HubError, match=r"names 'model-1.safetensors', which the repository does not hold"):
        fetch("hf://owner/lost")


def test_a_dropped_connection_is_continued(hub):
    hub.fault = "drop"
    assert fetch(ADDRESS).read_bytes() == CONTENT
    assert "bytes=150000-" in hub.downloads("weights.pt")


def test_a_truncated_body_is_continued_by_the_next_command(hub, tmp_path):
    hub.fault = "short"
    refused(ADDRESS, "arrived only in part, 150000 of 300000 bytes", "run the command again")
    assert blobs(tmp_path) == [hashlib.sha256(CONTENT).hexdigest() + ".partial"]
    hub.fault = ""
    assert fetch(ADDRESS).read_bytes() == CONTENT
    assert hub.downloads("weights.pt")[-1] == "bytes=150000-"
    assert len(blobs(tmp_path)) == 1


def test_a_server_without_ranges(hub):
    hub.fault = "short"
    refused(ADDRESS, "only in part")
    hub.fault = "no_range"
    assert fetch(ADDRESS).read_bytes() == CONTENT


def test_a_wrong_hash(hub, tmp_path):
    hub.fault = "damage"
    refused(ADDRESS, "has the hash", hashlib.sha256(CONTENT).hexdigest(), "deleted")
    refused("hf://owner/model/config.json", "has the hash")
    assert blobs(tmp_path) == []
    hub.fault = ""
    assert fetch(ADDRESS).read_bytes() == CONTENT


def test_a_web_page_in_place_of_the_file(hub, tmp_path):
    hub.fault = "page"
    refused(ADDRESS, "web page", "HF_TOKEN")
    assert blobs(tmp_path) == []


def test_a_web_page_in_place_of_the_hub(hub):
    hub.foreign = True
    refused(ADDRESS, "does not answer as a hub does", "HF_ENDPOINT")


def test_a_full_disk(hub, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    refused(ADDRESS, "needs 300.0 kB", "has 1.0 kB free", "HF_HUB_CACHE")
    assert not hub.downloads("weights.pt")


def test_offline_uses_the_cache_and_nothing_else(hub, monkeypatch):
    path = fetch("hf://owner/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    hub.requests.clear()
    assert fetch(ADDRESS) == path
    assert fetch("hf://owner/model") == path
    refused("hf://owner/model/absent.pt", "HF_HUB_OFFLINE")
    refused("hf://owner/shards", "HF_HUB_OFFLINE")
    assert not hub.requests


def test_a_hub_out_of_reach(hub, monkeypatch):
    path = fetch(ADDRESS)

    def unreachable(*_, **__):
        raise httpx2.ConnectError("refused")

    monkeypatch.setattr(hub_module, "get_hf_file_metadata", unreachable)
    assert fetch(ADDRESS) == path
    refused("hf://owner/model/config.json", "out of reach (refused)", "proxy")


def test_the_token_stays_with_the_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch(ADDRESS).read_bytes() == CONTENT
    assert {token for path, token in hub.authorized if path.startswith("/cdn")} == {None}
    assert {token for path, token in hub.authorized if not path.startswith("/cdn")} == {"Bearer hf_secret"}


def test_the_environment_and_the_command_line(hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "magma_jax.convert", "from-torch", ADDRESS, str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "not a PyTorch checkpoint" in result.stderr  # fetched, and read as what it is
    assert hub.downloads("weights.pt")
    hub.requests.clear()
    command = [sys.executable, "-c", f"from magma_jax.storage.hub import fetch; print(fetch({ADDRESS!r}))"]
    result = subprocess.run(
        command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True
    )
    assert Path(result.stdout.strip()).read_bytes() == CONTENT
    assert not hub.requests

"""Folders in a bucket, which is a server of the test: objects, local copies, and what can go wrong."""

import hashlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from magma_jax.output import OutputError, object_address
from magma_jax.storage.hub import local_path
from magma_jax.storage.objects import copies, store
from magma_jax.storage.objects.copies import Uploads, WorkingCopy, local_copy, new_folder, uploading
from magma_jax.storage.objects.store import Store, StoreError
from tests.storage.gcs_server import PAGE, bucket_server
from tests.storage.s3_server import s3_server


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named(scheme, package, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{package}.core", None)
    with pytest.raises(StoreError, match=f"{scheme}:// addresses need another package: pip install {package}"):
        store._files.__wrapped__(scheme)


@pytest.fixture(params=["gs", "s3"])
def folder(request):
    """An address, whose scheme decides by which API the objects of the bucket are reached."""
    pytest.importorskip({"gs": "gcsfs", "s3": "s3fs"}[request.param])
    return f"{request.param}://bucket/runs/a"


@pytest.fixture
def bucket(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = s3_server() if folder.startswith("s3") else bucket_server()
    bucket.clear()
    return bucket


def put(bucket, **contents):
    """Objects of the folder; their names without dots and slashes."""
    for number, (name, content) in enumerate(contents.items()):
        bucket.objects[f"runs/a/{name}"] = content, 1000 + number


def test_addresses():
    assert object_address("gs://bucket/run/") == object_address("gs:/bucket/run") == "gs://bucket/run"
    assert object_address("bucket/run") is object_address("az://bucket/run") is object_address("hf://a/b") is None


def test_objects_of_a_folder(bucket, folder, tmp_path):
    store = Store(folder)
    assert store.entries() == {}
    assert store.read("x/y") is None
    store.write("x/y", b"old")
    assert [store.create(name, b"new") for name in ("x/y", "z")] == [False, True]
    assert (store.read("x/y"), store.read("z")) == (b"old", b"new")
    # A folder whose name begins alike, and what a mount or the console leaves for a folder, do not count.
    bucket.objects |= {"runs/ab/x": (b"", 1), "runs/a/x/": (b"", 1)}
    assert {name: entry.size for name, entry in store.entries().items()} == {"x/y": 3, "z": 3}
    assert store.entries("x").keys() == {"x/y"}
    assert Store(f"{folder}/z").entries().keys() == {""}
    many = {f"many/{i}": tmp_path / str(i) for i in range(PAGE + 5)}
    for i, file in enumerate(many.values()):
        file.write_bytes(b"%d" % i)
    store.upload(many)
    assert len(store.entries("many")) == PAGE + 5
    store.download({"many/7": tmp_path / "deep/seven"})
    assert (tmp_path / "deep/seven").read_bytes() == b"7"
    store.remove(["many/7", "many/none"])
    assert len(store.entries("many")) == PAGE + 4


def test_one_of_many_creates_an_object(bucket, folder):
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda i: Store(folder).create("lock", b"%d" % i), range(8))) == 1


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs's own
def test_large_files_go_in_parts(bucket, folder, tmp_path):
    content = os.urandom(6 * 2**20)
    (tmp_path / "large").write_bytes(content)
    Store(folder).upload({"large": tmp_path / "large"})
    assert bucket.objects["runs/a/large"][0] == content
    assert Store(folder).sha256(["large"]) == {"large": hashlib.sha256(content).hexdigest()}
    if folder.startswith("gs"):  # S3 takes 100 MB at once
        assert sum(method == "POST" for method, _ in bucket.requests) == 2  # begun, then sent
    assert local_copy(f"{folder}/large").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("another/run", None, "{0}://another/run: there is no bucket another; check the name, or create it"),
        ("bucket/run", 403, "{0}://bucket/run: no permission ("),
        ("bucket/run", 401, "gs://bucket/run: not logged in (The fault that was asked for., 401); log in with `gcloud"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(bucket, folder, tmp_path, name, status, said):
    scheme = folder[:2]
    if scheme == "s3" and status == 401:
        pytest.skip("S3 answers 403 instead")
    address = f"{scheme}://{name}"
    bucket.fault = lambda method, name: status
    (tmp_path / "file").touch()
    store = Store(address)
    for work in (
        store.entries,
        lambda: store.read("x"),
        lambda: store.write("x", b""),
        lambda: store.create("x", b""),
        lambda: store.upload({"x": tmp_path / "file"}),
        lambda: store.download({"x": tmp_path / "x"}),
        lambda: local_copy(address),
    ):
        with pytest.raises(StoreError) as raised:
            work()
        assert str(raised.value).startswith(said.format(scheme))
        assert "\n" not in str(raised.value)


def test_a_passing_fault_is_repeated(bucket, folder):
    faults = iter([503])
    bucket.fault = lambda method, name: next(faults, None)
    Store(folder).write("x", b"x")
    assert bucket.names() == ["runs/a/x"]


def test_bad_addresses_and_names(bucket, folder):
    with pytest.raises(StoreError, match="gs://: names no bucket"):
        Store("gs://")
    with pytest.raises(StoreError, match="holds nothing; check the address"):
        local_copy(folder)
    put(bucket, **{"../../x": b""})
    with pytest.raises(StoreError, match="do not trust it"):
        local_copy(folder)


def test_a_copy_fetches_what_has_changed(bucket, folder):
    put(bucket, **{"model.json": b"{}", "params/0.0": b"zero", "metrics.jsonl": b"1"})
    local = local_path(folder)
    assert local.name == "a"
    assert (local / "params/0.0").read_bytes() == b"zero"
    assert local_copy(local) == local
    bucket.objects["runs/a/metrics.jsonl"] = b"1\n2", 2000
    del bucket.objects["runs/a/params/0.0"]
    bucket.requests.clear()
    assert local_copy(folder) == local
    assert (local / "metrics.jsonl").read_bytes() == b"1\n2"
    assert not (local / "params/0.0").exists()
    assert ("GET", "runs/a/model.json") not in bucket.requests


def test_a_copy_of_a_run_lacks_what_no_reader_needs(bucket, folder):
    step = {f"checkpoints/2/{name}": b"" for name in ("params/d/0", "optimizer/d/0", "progress/data.json")}
    put(
        bucket,
        **step,
        **{"checkpoints/4/params/d/0": b"", "tensorboard/events": b"", ".writer.lock": b"", "model.json": b"{}"},
    )
    put(bucket, **{"checkpoints/2/SHA256SUMS": b""})
    local = local_copy(folder)
    found = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    wanted = ["SHA256SUMS", "params/d/0", "progress/data.json"]
    assert found == [*(f"checkpoints/2/{name}" for name in wanted), "model.json"]


def test_a_copy_that_was_not_finished_is_fetched_again(bucket, folder):
    put(bucket, **{"a": b"one", "b": b"two"})
    local = local_copy(folder)
    record = local.parent / "fetched.json"
    record.write_text(json.dumps({name: tag for name, tag in json.loads(record.read_text()).items() if name != "a"}))
    (local / "a").write_text("on")
    assert (local_copy(folder) / "a").read_bytes() == b"one"


def test_new_and_changed_files_are_uploaded(bucket, folder):
    put(bucket, **{"model.json": b"{}", "params/0.0": b"zero"})
    bucket.requests.clear()
    with uploading(folder) as local:
        (local / "results.json").write_text("{}")
        (local / ".half.partial").write_text("{")
        (local / "evaluation").mkdir()
        (local / "evaluation/card.md").write_text("card")
    assert bucket.names("runs/a/") == [
        f"runs/a/{name}" for name in ("evaluation/card.md", "model.json", "params/0.0", "results.json")
    ]
    sent = {name for method, name in bucket.requests if method == "POST"}
    assert sent == {"runs/a/evaluation/card.md", "runs/a/results.json"}


def test_local_paths_are_left_alone(tmp_path):
    with uploading(tmp_path) as local, new_folder(tmp_path / "new") as new:
        assert (local, new) == (tmp_path, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_output_at_a_new_address(bucket, folder):
    with new_folder(folder) as local:
        assert not local.exists()
        (local / "params").mkdir(parents=True)
        (local / "model.json").write_text("{}")
        (local / "params/.zarray").write_text("{}")
    posted = [name for method, name in bucket.requests if method == "POST"]
    assert posted == ["runs/a/params/.zarray", "runs/a/model.json"]  # what makes it a model folder comes last
    with pytest.raises(OutputError, match="already exists; choose another name"), new_folder(folder):
        pass
    with new_folder(f"{folder[:2]}://bucket/file.safetensors") as file:
        file.write_bytes(b"file")
    assert bucket.objects["file.safetensors"][0] == b"file"

    def fail():
        with new_folder(f"{folder[:2]}://bucket/failed") as local:
            local.mkdir()
            (local / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not bucket.names("failed")


def test_a_new_run_takes_the_place_of_nothing_but_its_own_beginning(bucket, folder, tmp_path):
    copy = WorkingCopy(folder, tmp_path)
    copy.fetch()
    (copy.folder / "params").mkdir()
    (copy.folder / "params/0.0").touch()
    (copy.folder / "model.json").touch()
    put(bucket, **{".writer.lock": b"", ".unfinished": b"", "params/1.1": b""})
    copy.begin()
    assert bucket.names("runs/a/") == [f"runs/a/{name}" for name in (".writer.lock", "model.json", "params/0.0")]
    with pytest.raises(OutputError, match=f"{folder}: another process has begun a run here; start again"):
        copy.begin()
    del bucket.objects["runs/a/model.json"]
    for work in (copy.fetch, copy.begin):
        with pytest.raises(OutputError, match=f"{folder}: holds files, but no run; choose another name"):
            work()


def test_a_run_is_uploaded_in_the_background_and_at_its_end(bucket, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "UPLOAD_EVERY_S", 0.01)
    copy, sent = WorkingCopy(folder, tmp_path), threading.Event()
    bucket.fault = lambda method, name: sent.set() if method == "POST" else None
    with Uploads(copy):
        (copy.folder / "metrics.jsonl").write_text("1\n")
        assert sent.wait(10)
        (copy.folder / "metrics.jsonl").write_text("1\n2\n")
    assert bucket.objects["runs/a/metrics.jsonl"][0] == b"1\n2\n"
    put(bucket, **{"model.json": b"{}"})
    again = WorkingCopy(folder, tmp_path / "elsewhere")
    again.fetch()
    assert (again.folder / "metrics.jsonl").read_text() == "1\n2\n"
    bucket.fault = lambda method, name: 403
    with pytest.raises(StoreError), Uploads(copy):
        (copy.folder / "metrics.jsonl").write_text("3\n")
    with pytest.raises(RuntimeError), Uploads(copy):  # the first error is the one to report
        raise RuntimeError

"""Tar archives of samples, as WebDataset and img2dataset write them, and as people pack them."""

import gzip
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from magma_jax.data import readers
from magma_jax.data.format.records import HIDDEN, NOT_DOWNLOADED, DataError, Record, Skipped
from magma_jax.data.readers import tars


def jpeg(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "JPEG")
    return buffer.getvalue()


RED, BLUE = jpeg("red"), jpeg("blue")


def packed(path, *members, mode="w"):
    """An archive of names and contents; a content that is no bytes is the archive's own entry."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


def read(path, name="img2dataset", *arguments, **options):
    found = list(readers.read(name, path, *arguments, **options))
    records = {entry.id: (entry.captions, entry.image_bytes()) for entry in found if isinstance(entry, Record)}
    return records, [(entry.id, entry.reason) for entry in found if isinstance(entry, Skipped)]


def test_the_key_is_the_whole_path_up_to_the_first_dot_of_its_last_part(tmp_path):
    """What WebDataset itself gives for these names."""
    members = [
        ("cat/0001.jpg", RED),
        ("cat/0001.txt", b"a red cat"),
        ("dog/0001.jpg", BLUE),
        ("dog/0001.txt", b"a blue dog"),
        ("v1.2/x.JPG", RED),
        ("v1.2/x.seg.png", b"another kind of member"),
        ("v1.2/x.txt", b"x"),
        ("./0001.jpg", BLUE),
        ("./0001.txt", b"here"),
        ("README", b"no suffix, no sample"),
        ("__about__/0001.jpg", RED),
        ("__about__", b"of the archive"),
    ]
    records, skipped = read(packed(tmp_path / "a.tar", *members))
    assert records == {
        "cat/0001": (("a red cat",), RED),
        "dog/0001": (("a blue dog",), BLUE),
        "v1.2/x": (("x",), RED),
        "./0001": (("here",), BLUE),
    }
    assert skipped == []


def test_a_image_does_not_get_the_caption_of_its_namesake(tmp_path):
    members = [("cat/0001.jpg", RED), ("cat/0001.txt", b"a red cat"), ("dog/0001.jpg", BLUE)]
    records, skipped = read(packed(tmp_path / "a.tar", *members))
    assert records == {"cat/0001": (("a red cat",), RED)}
    assert skipped == [("dog/0001", "image without an annotation")]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (["a.jpg", "a.txt", "a.txt"], "the member a.txt comes twice"),
        (["a.jpg", "a.JPG"], "the member a.JPG comes twice"),
        (["a.jpg", "b.jpg", "a.txt"], "the member a.txt comes twice, or stands apart"),
        (["a/b.jpg", "a/b.txt", "c.jpg", "a/b.jpg"], "the member a/b.jpg comes twice, or stands apart"),
    ],
)
def test_members_that_come_twice_are_named(tmp_path, members, says):
    path = packed(tmp_path / "a.tar", *[(name, RED) for name in members])
    with pytest.raises(DataError, match=rf"a\.tar: {says}"):
        list(tars.tar_samples(path))


def test_hidden_members_are_counted_and_never_samples(tmp_path):
    members = [
        ("0.jpg", RED),
        ("0.txt", b"zero"),
        ("._0.jpg", b"AppleDouble"),
        ("._0.txt", b"AppleDouble"),
        ("__MACOSX/0.jpg", b"AppleDouble"),
        ("a/.ipynb_checkpoints/0-checkpoint.jpg", RED),
        (".DS_Store", b""),
        ("link.jpg", (tarfile.LNKTYPE, "0.jpg")),
        ("folder.jpg", (tarfile.DIRTYPE, "")),
    ]
    packed(tmp_path / "a.tar", *members)
    (tmp_path / "._a.tar").write_bytes(b"AppleDouble")
    records, skipped = read(tmp_path)
    assert set(records) == {"0"}
    hidden = ["._0.jpg", "__MACOSX/0.jpg", "a/.ipynb_checkpoints/0-checkpoint.jpg"]
    assert skipped == [*[(name, HIDDEN) for name in hidden], ("link.jpg", "no file of its own in the tar archive")]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_archives(tmp_path, name):
    members = [
        ("0.jpg", RED),
        ("0.json", b'{"url": "http://x/0", "caption": "zero"}'),
        ("1.jpg", BLUE),
        ("1.txt", b"one"),
    ]
    path = packed(tmp_path / name, *members, mode="w:gz")
    pyarrow.parquet.write_table(pyarrow.table({"key": ["0"], "similarity": [0.5]}), tmp_path / "a.parquet")
    found = {entry.id: entry for entry in readers.read("img2dataset", tmp_path)}
    assert (found["0"].image_bytes(), found["1"].image_bytes()) == (RED, BLUE)
    assert found["0"].metadata == {"similarity": 0.5, "url": "http://x/0"}
    (tmp_path / "list.tsv").write_text("zero\thttp://x/0\n")
    assert read(tmp_path / "list.tsv", "cc3m", tmp_path)[0] == {"1": (("zero",), RED)}
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], gzip.compress(gzip.decompress(whole)[:1500]), whole[:20] + b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"not a whole tar archive \([^\n]*; fetch it again$"):
            list(readers.read("img2dataset", path))


def test_what_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    path = packed(tmp_path / "a.tgz", ("0.jpg", bytes(3000)), mode="w:gz")
    monkeypatch.setattr(tars, "LARGEST_MEMBER", 2000)
    with pytest.raises(DataError, match=r"0\.jpg has 3000 bytes; unpack the archive first"):
        list(readers.read("img2dataset", path))
    sparse = tarfile.TarInfo("1.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.size": str(10**14), "GNU.sparse.map": "0,1"}
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse)
    with pytest.raises(DataError, match=r"1\.jpg is sparse"):
        list(readers.read("img2dataset", tmp_path / "b.tar"))


def test_failed_downloads_are_counted(tmp_path):
    """img2dataset lists them in the parquet file beside the archive, and nowhere else."""
    packed(tmp_path / "00000.tar", ("000000.jpg", RED), ("000000.txt", b"zero"), ("000000.json", b"{}"))
    rows = {
        "key": ["000000", "000001", "000002"],
        "status": ["success", "failed_to_download", "failed_to_resize"],
        "error_message": [None, "HTTP Error 404: Not Found", None],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "00000.parquet")
    skipped = [entry for entry in readers.read("img2dataset", tmp_path) if isinstance(entry, Skipped)]
    assert [(entry.id, entry.reason) for entry in skipped] == [("000001", NOT_DOWNLOADED), ("000002", NOT_DOWNLOADED)]
    assert [entry.detail for entry in skipped] == ["HTTP Error 404: Not Found", "failed_to_resize"]


def test_json_that_nests_without_end_is_refused(tmp_path):
    path = packed(tmp_path / "a.tar", ("0.jpg", RED), ("0.json", b"[" * 200_000))
    with pytest.raises(DataError, match=r"a\.tar: a \.json member is not valid JSON"):
        list(readers.read("img2dataset", path))
    (tmp_path / "coco.json").write_text(json.dumps({"images": []})[:-2] + "[" * 200_000)
    with pytest.raises(DataError, match=r"coco\.json: "):
        list(readers.read("coco", tmp_path / "coco.json", tmp_path))

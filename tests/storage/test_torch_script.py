"""TorchScript archives: the tensors under their names in ``state_dict()``, and nothing of the code."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from magma_jax.storage.files import open_tensors
from magma_jax.storage.torch import reader as torch_reader
from magma_jax.storage.torch.reader import TorchFileError, open_torch_file

# Made by fixtures/make.py.
SCRIPT = Path(__file__).parent / "fixtures" / "script.pt"


def archive(path, code):
    """An archive whose pickle is ``code``; the compressed entry under code/ is no Python."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", code)
        file.writestr("a/data/0", bytes(24))
        file.writestr("a/constants.pkl", b"")
        file.writestr("a/code/__torch__.py", b"(" * 1000, zipfile.ZIP_DEFLATED)


def module(content, name=b"__torch__.x Model"):
    """Pickle code of an object with these attributes."""
    return b"c" + name.replace(b" ", b"\n") + b"\n)\x81}(" + content + b"ub"


def text(name):
    return pickle.dumps(name, 2)[2:-1].split(b"q")[0]


def tensor():
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0(K\x06t(K\x01t\x89ccollections\nOrderedDict\n)RtR"


def test_reads_names_and_values():
    with open_tensors(SCRIPT) as weights:
        tensors = {name: found.read() for name, found in weights.tensors.items()}
    assert list(tensors) == [
        "input_resolution",
        "visual.class_embedding",
        "visual.conv1.weight",
        *(f"visual.bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        *(f"visual.blocks.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")),
    ]
    assert tensors["input_resolution"] == 224
    np.testing.assert_array_equal(tensors["visual.class_embedding"], np.arange(4, dtype=np.float16) / 4)
    np.testing.assert_array_equal(tensors["visual.conv1.weight"].ravel(), np.arange(48, dtype=np.float16) / 4 + 1)
    assert tensors["visual.blocks.1.bias"].dtype == np.float16


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_equals_the_state_dict_of_a_trace(tmp_path):
    torch = pytest.importorskip("torch")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2)
            self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))

        def forward(self, x):
            return self.mlp(self.attn(x, x, x, need_weights=False)[0])

    model = torch.nn.Sequential(Block(), Block()).eval()
    torch.jit.trace(model, torch.zeros(3, 1, 8)).save(tmp_path / "trace.pt")
    with open_tensors(tmp_path / "trace.pt") as weights:
        assert list(weights.tensors) == list(model.state_dict())
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(weights.tensors[name].read(), value.numpy())


def test_reads_what_the_attacks_below_are_made_of(tmp_path):
    archive(tmp_path / "x.pt", b"\x80\x02" + module(text("a") + module(text("b") + tensor())) + b".")
    with open_torch_file(tmp_path / "x.pt") as file:
        assert {name: found.shape for name, found in file.tree.items()} == {"a.b": (6,)}


CHILD = text("a") + tensor()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (module(CHILD, b"posix system"), "'posix.system'.*nothing was run"),
        (module(CHILD, b"__torch__ system"), None),
        (b"c__torch__.x\nModel\n(X\x02\0\0\0ls\x85tR", "calls __torch__.x.Model with arguments"),
        (b"c__torch__.x\nModel\n(K\x01t\x81", "object that TorchScript does not write"),
        (b"ctorch.jit._pickle\nbuild_intlist\n)\x81", "object that TorchScript does not write"),
        (b"c__torch__.x\nModel\n)\x81K\x01b", "not a dict of attributes"),
        (b"c__torch__.x\nModel\n)\x81}(K\x01K\x02ub", "not a dict of attributes"),
        (b"c__torch__.x\nModel\n)\x81(X\x01\0\0\0aK\x01u", "fills a Attributes"),
        (b"ctorch.jit._pickle\nbuild_tensor_from_id\nK\x01\x85R", "build_tensor_from_id"),
    ],
)
def test_refuses_what_torchscript_does_not_write(tmp_path, code, message):
    archive(tmp_path / "x.pt", b"\x80\x02" + code + b".")
    if message is None:
        open_torch_file(tmp_path / "x.pt").close()
        return
    with pytest.raises(TorchFileError, match=message) as error:
        open_torch_file(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_refuses_modules_that_contain_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_reader, "MAX_SCRIPT_MODULES", 500)
    # One that contains itself, and twelve levels of one that is there twice.
    itself = b"c__torch__.x\nModel\n)\x81q\x01}(" + text("a") + b"h\x01ub"
    twice = module(CHILD) + b"q\x01"
    for i in range(12):
        twice += b"0" + module(text("a") + b"h" + bytes([i + 1]) + text("b") + b"h" + bytes([i + 1])) + b"q"
        twice += bytes([i + 2])
    for code in (itself, twice):
        archive(tmp_path / "x.pt", b"\x80\x02" + code + b".")
        with pytest.raises(TorchFileError, match="contain each other without end"):
            open_torch_file(tmp_path / "x.pt")


def test_classes_are_refused_outside_of_torchscript(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + module(CHILD) + b".")
        file.writestr("a/data/0", bytes(24))
    with pytest.raises(TorchFileError, match=r"'__torch__\.x\.Model'"):
        open_torch_file(tmp_path / "x.pt")


def test_damage_gives_values_or_an_error_and_nothing_else(tmp_path):
    content = SCRIPT.read_bytes()
    start = content.index(b"data.pkl")
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        for position in generator.integers(start, start + 2000, 3):
            damaged[position] = generator.integers(256)
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            with open_torch_file(tmp_path / "x.pt") as file:
                for found in file.tree.values():
                    found.read()
        except TorchFileError:
            pass

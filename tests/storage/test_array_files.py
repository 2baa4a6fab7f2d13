"""Arrays on disk: Orbax reads them on any mesh, stacks pass layer by layer, older layouts can be opened."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from magma_jax.nn.modules import nest
from magma_jax.runtime.sharding import MeshConfig, make_mesh
from magma_jax.storage import array_files
from magma_jax.storage.array_files import flatten, open_arrays, read_arrays, write_arrays
from magma_jax.storage.deferred import Deferred

PARAMS = {
    "lm/layers/weight": np.arange(3 * 16 * 8, dtype=np.float16).reshape(3, 16, 8),
    "lm/layers/bias": np.zeros((3, 8), ml_dtypes.bfloat16),
    "lm/wte": np.arange(40.0, dtype=np.float32).reshape(10, 4),
    "count": np.array(7, np.int32),
    "flag": np.array([True, False]),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """So that arrays of a test are cut like those of a large model: layers by themselves, and again inside."""
    monkeypatch.setattr(array_files, "CHUNK_NBYTES", 64)
    monkeypatch.setattr(array_files, "_ROW_NBYTES", 32)
    monkeypatch.setattr(array_files, "_IN_FLIGHT_NBYTES", 256)
    monkeypatch.setattr(array_files, "_GROUP_NBYTES", 100)


def assert_same(found, expected=PARAMS):
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert (found[path].shape, found[path].dtype) == (array.shape, array.dtype)
        assert np.asarray(found[path]).tobytes() == array.tobytes()


@pytest.mark.usefixtures("small_chunks")
def test_orbax_reads_what_was_written(tmp_path):
    write_arrays(tmp_path / "x", PARAMS | {"lm/wte": jnp.asarray(PARAMS["lm/wte"])})
    assert_same(flatten(ocp.load(tmp_path / "x")))
    assert len(list(tmp_path.glob("x/*/lm.layers.weight/*.*.*"))) == 3 * 4  # 4 rows of 16 bytes make a part


@pytest.mark.usefixtures("small_chunks")
def test_on_any_mesh_and_in_another_dtype(tmp_path):
    write_arrays(tmp_path / "x", PARAMS)
    mesh = make_mesh(MeshConfig(fsdp=4, model=2))
    spec = PartitionSpec(None, ("fsdp", "model"))
    wanted = {
        "lm/layers/weight": jax.ShapeDtypeStruct((3, 16, 8), jnp.bfloat16, sharding=NamedSharding(mesh, spec)),
        "lm/wte": jax.ShapeDtypeStruct((10, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())),
    }
    loaded = read_arrays(tmp_path / "x", wanted, open_arrays(tmp_path / "x"))
    assert {path: leaf.sharding for path, leaf in loaded.items()} == {p: w.sharding for p, w in wanted.items()}
    assert loaded["lm/layers/weight"].addressable_shards[0].data.shape == (3, 2, 8)
    assert_same(loaded, {path: PARAMS[path].astype(leaf.dtype) for path, leaf in wanted.items()})


@pytest.mark.usefixtures("small_chunks")
def test_a_stack_is_read_layer_by_layer_in_the_order_of_the_file(tmp_path):
    reads = []

    def row(layer, position):
        array = PARAMS["lm/layers/weight"][layer]

        def read():
            reads.append(layer)
            return array

        return Deferred(array.shape, array.dtype, read, position=("file", position))

    def whole():
        raise AssertionError("the stack must not be read whole")

    rows = (row(0, 30), row(1, 10), row(2, 20))
    done = []
    write_arrays(tmp_path / "x", {"w": Deferred((3, 16, 8), np.dtype(np.float16), whole, rows)}, done.append)
    assert reads == [1, 2, 0]
    assert done == [256] * 3
    stack = open_arrays(tmp_path / "x")["w"]
    np.testing.assert_array_equal(stack.rows[1].read(), PARAMS["lm/layers/weight"][1])
    np.testing.assert_array_equal(stack.read(), PARAMS["lm/layers/weight"])


def test_what_is_not_as_announced(tmp_path):
    wrong = Deferred((3,), np.dtype(np.float32), lambda: np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"announced as \(3,\) float32, read as \(2,\) float32"):
        write_arrays(tmp_path / "x", {"a": wrong})


def test_opens_what_orbax_writes_by_default(tmp_path):
    ocp.save(tmp_path / "x", nest(PARAMS))
    opened = open_arrays(tmp_path / "x")
    assert_same({path: tensor.read() for path, tensor in opened.items()})


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((28, 16384, 4096), (1, 4096, 4096)),  # 32 MiB
        ((28, 4096, 16384), (1, 1024, 16384)),
        ((28, 512, 4096), (1, 512, 4096)),
        ((28, 4096), (28, 4096)),
        ((50258, 4096), (4096, 4096)),
        ((17, 384, 384, 3, 3), (1, 384, 384, 3, 3)),
        ((), ()),
    ],
)
def test_parts_of_full_size_arrays(shape, chunk):
    assert array_files._chunk_shape(np.broadcast_to(np.float16(0), shape)) == chunk

"""Slim checkpoints of mesh-transformer-jax: written as that code writes them, read as the GPT-J of Hugging Face."""

import jax
import ml_dtypes
import numpy as np
import pytest

from magma_jax.published.mesh_transformer import is_mesh_transformer, open_mesh_transformer
from magma_jax.storage.byte_file import WeightFileError

# Twelve layers, so that layer_10 sorts before layer_2.
SHARDS, LAYERS, WIDTH, FEED_FORWARD, VOCAB = 4, 12, 8, 16, 20


def weights(generator):
    """Hugging Face names to arrays that bfloat16 holds exactly, and the word table's bias."""

    def array(*shape):
        return generator.integers(-128, 128, shape).astype(np.float32) / 64

    tensors = {"transformer.wte.weight": array(VOCAB, WIDTH), "lm_head.weight": array(VOCAB, WIDTH)}
    tensors |= {
        "lm_head.bias": array(VOCAB),
        "transformer.ln_f.weight": array(WIDTH),
        "transformer.ln_f.bias": array(WIDTH),
    }
    for i in range(LAYERS):
        names = {"ln_1.weight": (WIDTH,), "ln_1.bias": (WIDTH,)}
        names |= {f"attn.{name}_proj.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
        names |= {"mlp.fc_in.weight": (FEED_FORWARD, WIDTH), "mlp.fc_in.bias": (FEED_FORWARD,)}
        names |= {"mlp.fc_out.weight": (WIDTH, FEED_FORWARD), "mlp.fc_out.bias": (WIDTH,)}
        tensors |= {f"transformer.h.{i}.{name}": array(*shape) for name, shape in names.items()}
    return tensors


def tree(tensors, shard, dtype):
    """One shard's parameters as that code's modules hold them."""

    def rows(array):
        return np.array_split(array, SHARDS)[shard].astype(dtype)

    def linear(weight, bias=None):
        return {"w": weight.astype(dtype)} | ({} if bias is None else {"b": bias.astype(dtype)})

    def summed(bias):  # each shard adds a part
        return bias * [0.25, 0.25, 0.5, 0.0][shard]

    def norm(name):  # only the first shard's was trained
        scale, offset = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return {
            "scale": (scale if shard == 0 else scale * 0 + 1).astype(dtype),
            "offset": (offset * (shard == 0)).astype(dtype),
        }

    root = "causal_transformer_shard/~/"
    half = np.full(WIDTH, 0.5, np.float32)
    params = {
        root + "embedding_shard/~/linear": linear(rows(tensors["transformer.wte.weight"] - half), summed(half)),
        root + "projection_shard/~/linear": linear(rows(tensors["lm_head.weight"]).T, rows(tensors["lm_head.bias"])),
        root + "projection_shard/~/replicated_layer_norm": norm("transformer.ln_f"),
    }
    for i in range(LAYERS):
        layer, h = f"{root}layer_{i}/~/", f"transformer.h.{i}."
        params[layer + "replicated_layer_norm"] = norm(h + "ln_1")
        for name, key in (("linear", "q"), ("linear_1", "v"), ("linear_2", "k")):
            params[layer + name] = linear(rows(tensors[f"{h}attn.{key}_proj.weight"]).T)
        params[layer + "linear_3"] = linear(rows(tensors[h + "attn.out_proj.weight"].T))
        params[layer + "linear_4"] = linear(
            rows(tensors[h + "mlp.fc_in.weight"]).T, rows(tensors[h + "mlp.fc_in.bias"])
        )
        params[layer + "linear_5"] = linear(
            rows(tensors[h + "mlp.fc_out.weight"].T), summed(tensors[h + "mlp.fc_out.bias"])
        )
    return {"params": params, "step": np.array(383500)}


def write(folder, tensors, dtype, files=16):
    for shard in range(SHARDS):
        (folder / f"shard_{shard}").mkdir(parents=True)
        leaves = jax.tree.leaves(tree(tensors, shard, dtype))
        size, longer = divmod(len(leaves), files)
        for i in range(files):
            start = i * size + min(i, longer)
            part = leaves[start : start + size + (i < longer)]
            np.savez(folder / f"shard_{shard}" / f"{i}.npz", *part)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_reads_every_tensor(tmp_path, dtype):
    expected = weights(np.random.default_rng(0))
    write(tmp_path, expected, dtype)
    assert is_mesh_transformer(tmp_path)
    tensors = open_mesh_transformer(tmp_path)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        found = tensor.read()
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(found.astype(np.float32), expected[name], name)


def test_what_is_no_slim_checkpoint(tmp_path):
    assert not is_mesh_transformer(tmp_path)
    write(tmp_path, weights(np.random.default_rng(0)), np.float16)
    (tmp_path / "shard_2" / "7.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightFileError, match=r"shard_2/7.npz: missing or damaged"):
        open_mesh_transformer(tmp_path)
    np.savez(tmp_path / "shard_2" / "7.npz", np.zeros(3))
    with pytest.raises(WeightFileError, match="do not hold the same number of arrays"):
        open_mesh_transformer(tmp_path)
    np.savez(tmp_path / "shard_0" / "0.npz", np.array(["text"]))
    with pytest.raises(WeightFileError, match="which no slim GPT-J does"):
        open_mesh_transformer(tmp_path)

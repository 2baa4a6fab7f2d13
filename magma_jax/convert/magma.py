"""MAGMA checkpoints: the published PyTorch layout to our parameters, and back, bit for bit."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from magma_jax.config import from_dict, to_dict
from magma_jax.convert import keymap
from magma_jax.convert.infer import InferenceError, infer_config
from magma_jax.convert.keymap_patterns import fill
from magma_jax.convert.keymap_rules import Rule, Table, match_theirs
from magma_jax.convert.magma_table import BUFFERS, attention_buffers, magma_table
from magma_jax.convert.torch_reader import TorchFileError, open_torch_file, state_dict
from magma_jax.convert.torch_writer import write_torch_file
from magma_jax.data.tokenizer import gpt2_tokenizer
from magma_jax.models.magma import MagmaConfig, MagmaModel
from magma_jax.nn.modules import Params, abstract
from magma_jax.training.checkpoint import read_trained_params
from magma_jax.training.model_folder import CheckpointError, read_model_json, write_model_folder
from magma_jax.version import __version__

TORCH_FILE = "torch.json"
BUFFER_FILE = "torch_buffers.npz"


def model_shapes(config: MagmaConfig) -> dict[str, Any]:
    """Shape and dtype of every parameter, without memory."""
    return abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))[1]


def read_torch_magma(
    path: str | Path, model_config: Mapping[str, Any] | None = None
) -> tuple[MagmaConfig, Params, dict[str, Any]]:
    """Reads a PyTorch checkpoint in the published layout; needs no PyTorch and runs no code.

    Args:
        path: the file (DeepSpeed dict or bare state dict, zip or legacy format, fp16 or fp32).
        model_config: what the tensors cannot tell, see ``convert.infer``.

    Returns:
        The config, the parameters in the dtypes of the file, and what ``to-torch`` needs to write the same file
        again: the counters beside the weights, and buffers that differ from the recomputed ones.

    Raises:
        TorchFileError, InferenceError, KeyMapError: with one message that names everything that does not fit.
    """
    path = Path(path)
    with open_torch_file(path) as file:
        try:
            tensors, counters = state_dict(file.tree)
            config = infer_config(tensors, model_config)
            table = magma_table(config)
            plan = keymap.to_ours(table, tensors, _in_stored_dtypes(model_shapes(config), table, tensors))
            params = {name: np.array(tensor.read()) for name, tensor in plan.items()}
        except (TorchFileError, InferenceError, keymap.KeyMapError) as error:
            raise type(error)(f"{path}: {error}") from None
        source = {
            "file": path.name,
            "counters": counters,
            "keys": list(tensors),
            "buffers": _unusual_buffers(config, tensors),
        }
    return config, params, source


def write_torch_magma(
    path: str | Path, config: MagmaConfig, params: Mapping[str, Any], source: Mapping[str, Any]
) -> None:
    """Writes the published layout, ``{"module": state_dict}`` and the counters of ``source``.

    The file appears under its name only when it is whole.
    """
    dtype = np.asarray(params["lm/wte/weight"][:1]).dtype
    buffers = attention_buffers(config, dtype)
    table = magma_table(config, buffers)
    module = keymap.to_theirs(table, params)
    for key, array in source.get("buffers", {}).items():
        module |= {name: array for name in (key, _second_name(key)) if name in module}
    if "keys" in source:
        # A file may lack second names and buffers; it gets none that it did not have.
        order = {key: i for i, key in enumerate(source["keys"])}
        weights = keymap.to_theirs([entry for entry in table if isinstance(entry, Rule)], params)
        module = {key: tensor for key, tensor in module.items() if key in order or key in weights}
        module = dict(sorted(module.items(), key=lambda item: order.get(item[0], len(order))))
    write_torch_file(path, {"module": module, **source.get("counters", {})})


def from_torch(checkpoint: str | Path, out: str | Path, model_config: Mapping[str, Any] | None = None) -> MagmaConfig:
    """Converts a PyTorch checkpoint to a model folder; nothing is written unless everything fits.

    Raises:
        CheckpointError: something already stands at ``out``. And whatever ``read_torch_magma`` raises.
    """
    if Path(out).exists():  # checked again before writing; here it saves reading 12 GB for nothing
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    config, params, source = read_torch_magma(checkpoint, model_config)

    counters = {key: value for key, value in source["counters"].items() if _is_json(value)}
    dropped = sorted(set(source["counters"]) - set(counters), key=str)
    if dropped:
        print(f"{checkpoint}: not kept, since no weights: {', '.join(map(str, dropped))}", file=sys.stderr)

    def extras(folder: Path) -> None:
        gpt2_tokenizer().save(folder / "tokenizer")
        np.savez_compressed(folder / BUFFER_FILE, **source["buffers"])
        (folder / TORCH_FILE).write_text(json.dumps({"counters": counters, "keys": source["keys"]}))

    metadata = {"model": to_dict(config), "source": source["file"], "magma_jax": __version__}
    write_model_folder(out, metadata, params, extras)
    return config


def to_torch(folder: str | Path, checkpoint: str | Path) -> None:
    """Writes a model folder as a PyTorch checkpoint in the published layout.

    Raises:
        FileExistsError: something already stands at ``checkpoint``.
    """
    folder, checkpoint = Path(folder), Path(checkpoint)
    if checkpoint.exists():
        raise FileExistsError(f"{checkpoint}: already exists; choose another name or remove it first")
    config, params = read_model_folder(folder)
    source: dict[str, Any] = {}
    if (folder / TORCH_FILE).is_file():
        source = json.loads((folder / TORCH_FILE).read_text())
        with np.load(folder / BUFFER_FILE) as buffers:
            source["buffers"] = dict(buffers)
    write_torch_magma(checkpoint, config, params, source)


def read_model_folder(folder: str | Path) -> tuple[MagmaConfig, Params]:
    """Config and parameters of a model folder or a trained run, in the dtypes it stores."""
    config = from_dict(MagmaConfig, read_model_json(folder)["model"], "model.json: model")
    _, shapes, types = abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))
    return config, read_trained_params(folder, shapes, types, keep_dtype=True)


def _is_json(value: object) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def _in_stored_dtypes(shapes: Mapping[str, Any], table: Table, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """``shapes`` with the file's floating dtypes, which may differ between parameters."""
    found: dict[str, dict[np.dtype, str]] = {}
    for key, tensor in tensors.items():
        for rule in table:
            if isinstance(rule, Rule) and (values := match_theirs(rule, key)) is not None:
                found.setdefault(fill(rule.ours, values, "/"), {}).setdefault(tensor.dtype, key)
    mixed = [" and ".join(f"{key} {dtype.name}" for dtype, key in by.items()) for by in found.values() if len(by) > 1]
    if mixed:
        raise keymap.KeyMapError(
            "layers of one parameter have different dtypes, which a stack cannot hold: " + "; ".join(mixed)
        )
    return {
        path: jax.ShapeDtypeStruct(shape.shape, next(iter(found[path])))
        if path in found and np.issubdtype(shape.dtype, np.floating)
        else shape
        for path, shape in shapes.items()
    }


def _unusual_buffers(config: MagmaConfig, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Buffers whose bits recomputing does not give: sines differ in the last bit between math libraries."""
    unusual, usual = {}, {}
    for key, tensor in tensors.items():
        name = key.rsplit(".", 1)[-1]
        if not key.startswith("lm.") or ".attention." not in key or name not in BUFFERS:
            continue
        if tensor.dtype not in usual:
            usual[tensor.dtype] = attention_buffers(config, tensor.dtype)
        array = tensor.read()
        if array.tobytes() != usual[tensor.dtype][name].tobytes() or array.shape != usual[tensor.dtype][name].shape:
            unusual[key] = np.array(array)
    return unusual


def _second_name(key: str) -> str:
    return key.replace("lm.transformer.h.", "transformer.", 1)

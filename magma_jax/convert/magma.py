"""MAGMA checkpoints: the published PyTorch layout to our parameters, and back, bit for bit."""

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from magma_jax.config import ConfigError, from_dict, to_dict
from magma_jax.convert import keymap
from magma_jax.convert.deferred import alias_key
from magma_jax.convert.files import open_tensors
from magma_jax.convert.golden import BAD_NPZ
from magma_jax.convert.hashing import hashing
from magma_jax.convert.infer import InferenceError, infer_config
from magma_jax.convert.keymap_patterns import fill
from magma_jax.convert.keymap_rules import Rule, Table, match_theirs
from magma_jax.convert.magma_table import BUFFERS, attention_buffers, is_weight, magma_table
from magma_jax.convert.progress import writing
from magma_jax.convert.safetensors_file import write_safetensors
from magma_jax.convert.torch_writer import write_torch_file
from magma_jax.data.tokenizer import Tokenizer, gpt2_tokenizer
from magma_jax.foreign import (
    MAX_TEXT_NBYTES,
    ForeignError,
    check_tree,
    open_regular,
    parse_json,
    read_json,
    shown,
)
from magma_jax.models.magma import MagmaConfig, MagmaModel
from magma_jax.nn.modules import Params, abstract
from magma_jax.training.checkpoint import read_what_was_trained
from magma_jax.training.model_folder import (
    BUFFER_FILE,
    TORCH_FILE,
    CheckpointError,
    in_dtype,
    nbytes_of,
    open_params,
    read_model_json,
    write_model_folder,
)
from magma_jax.version import __version__

# Masks of 28 layers and 2048 positions, if all of them were unusual, take 120 MB.
_MAX_BUFFER_NBYTES = 2**30
# Of a safetensors file's metadata: the config, as JSON.
CONFIG_KEY = "magma_config"
# And the vocabulary, unless it is GPT-2's.
TOKENIZER_KEY = "magma_tokenizer"


def model_shapes(config: MagmaConfig) -> dict[str, Any]:
    """Shape and dtype of every parameter, without memory."""
    return dict(abstract_model(config)[0])


@functools.lru_cache(maxsize=16)
def abstract_model(config: MagmaConfig) -> tuple[Params, dict[str, type[nnx.Variable]]]:
    """Shapes and variable types of a model, by path."""
    return abstract(lambda: MagmaModel(config, rngs=nnx.Rngs(0)))[1:]


@dataclass(frozen=True)
class OpenMagma:
    """A model whose parameters are not read yet.

    Attributes:
        config: its sizes.
        params: path to ``Deferred``; valid inside the block that opened them.
        source: what ``to_torch`` needs to write the same file again: the counters beside the weights, the order of
            the keys, and buffers that differ from the recomputed ones.
        files: where the parameters come from.
        tokenizer: GPT-2's for files that hold none.
    """

    config: MagmaConfig
    params: Params
    source: dict[str, Any]
    files: tuple[Path, ...]
    tokenizer: Tokenizer


@contextlib.contextmanager
def open_torch_magma(
    path: str | Path, model_config: Mapping[str, Any] | None = None, dtype: str | None = None
) -> Iterator[OpenMagma]:
    """Opens a checkpoint in the published layout of keys; needs no PyTorch and runs no code.

    Args:
        path: anything that ``open_tensors`` opens: a PyTorch file (DeepSpeed dict or bare state dict), safetensors,
            or a folder of shards.
        model_config: what the tensors cannot tell, see ``convert.infer``.
        dtype: dtype of all floating parameters; default: as in the file.

    Raises:
        WeightFileError, InferenceError, KeyMapError: with one message that names everything that does not fit.
    """
    with open_tensors(path) as weights:
        tensors = weights.tensors
        try:
            described = weights.others.get(CONFIG_KEY)
            if isinstance(described, str):  # safetensors that this library wrote
                config = from_dict(MagmaConfig, parse_json(described), f"{CONFIG_KEY}: model")
            else:
                config = infer_config(tensors, model_config, lambda line: print(f"{path}: {line}", file=sys.stderr))
            _check_types(tensors)
            tokenizer = _tokenizer_in(weights.others)
            table = magma_table(config)
            shapes = model_shapes(config)
            target = _in_stored_dtypes(shapes, table, tensors) if dtype is None else in_dtype(shapes, dtype)
            params = keymap.to_ours(table, tensors, target)
            source = {
                "counters": {} if weights.metadata_is_text else weights.others,
                "keys": list(tensors),
                "buffers": _unusual_buffers(config, tensors),
            }
        except (InferenceError, keymap.KeyMapError, ConfigError) as error:
            raise type(error)(f"{path}: {error}") from None
        except ForeignError as error:
            raise InferenceError(f"{path}: its {CONFIG_KEY} {error}") from None
        except ValueError as error:
            raise InferenceError(f"{path}: {error}") from None
        yield OpenMagma(config, params, source, weights.files, tokenizer)


def read_torch_magma(
    path: str | Path,
    model_config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> tuple[MagmaConfig, Params, Tokenizer]:
    """Config, parameters and vocabulary of a checkpoint in the published layout, see ``open_torch_magma``.

    ``place(path, array)`` takes each array as soon as it is read, to move it to its devices. The largest come first,
    so that an array and its copy meet when little else is in memory.
    """
    with open_torch_magma(path, model_config, dtype) as model:
        order = sorted(model.params, key=lambda name: -math.prod(model.params[name].shape))
        params = {name: place(name, model.params[name].read()) for name in order}
        check_vocabulary(path, model.tokenizer, model.config)
        return model.config, {name: params[name] for name in model.params}, model.tokenizer


def check_vocabulary(path: str | Path, tokenizer: Tokenizer, config: MagmaConfig) -> None:
    """Says so where a model has fewer rows than its vocabulary has words, as one of another vocabulary has."""
    if tokenizer.vocab_size > config.lm.vocab_rows:
        print(
            f"{path}: embeds {config.lm.vocab_rows} words, but its vocabulary (GPT-2's unless it holds another) has "
            f"{tokenizer.vocab_size}; from-torch --tokenizer sets the right one",
            file=sys.stderr,
        )


def published_module(model: OpenMagma) -> dict[str, Any]:
    """All tensors of a model under the published keys, second names and buffers included, in the source's order."""
    buffers = attention_buffers(model.config, np.dtype(model.params["lm/wte/weight"].dtype))
    table = magma_table(model.config, buffers)
    module = keymap.to_theirs(table, model.params)
    for key, array in model.source.get("buffers", {}).items():
        module |= {name: array for name in (key, _second_name(key)) if name in module}
    if "keys" in model.source:
        # A file may lack second names and buffers; it gets none that it did not have.
        order = {key: i for i, key in enumerate(model.source["keys"])}
        module = {key: tensor for key, tensor in module.items() if key in order or is_weight(key)}
        module = dict(sorted(module.items(), key=lambda item: order.get(item[0], len(order))))
    return module


def from_torch(
    checkpoint: str | Path,
    out: str | Path,
    model_config: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> MagmaConfig:
    """Converts a checkpoint in the published layout to a model folder; nothing is written unless everything fits.

    Tensors pass through one at a time, in the order of the file, and stay in its dtypes.

    Args:
        checkpoint: see ``open_torch_magma``.
        out: the folder; must not exist.
        model_config: what the tensors cannot tell, see ``convert.infer``.
        tokenizer: the model's vocabulary; default: the file's own if it holds one, else GPT-2's, which the published
            models have.

    Raises:
        CheckpointError: something already stands at ``out``, or the disk is too small. And whatever
            ``open_torch_magma`` raises.
    """
    if Path(out).exists():  # checked again before writing; here it saves reading 12 GB for nothing
        raise CheckpointError(f"{out}: already exists; choose another name or remove it first")
    with open_torch_magma(checkpoint, model_config) as model:
        source = model.source
        counters = {key: value for key, value in source["counters"].items() if _is_json(value)}
        dropped = sorted(set(source["counters"]) - set(counters), key=str)
        if dropped:
            print(f"{checkpoint}: not kept, since no weights: {', '.join(map(shown, dropped[:20]))}", file=sys.stderr)

        words = tokenizer or model.tokenizer
        check_vocabulary(checkpoint, words, model.config)

        def extras(folder: Path) -> None:
            words.save(folder / "tokenizer")
            np.savez_compressed(folder / BUFFER_FILE, **source["buffers"])
            (folder / TORCH_FILE).write_text(json.dumps({"counters": counters, "keys": source["keys"]}))

        with hashing(model.files) as digest_of, writing(out, nbytes_of(model.params)) as progress:

            def metadata() -> dict[str, Any]:
                sums = {file.name: digest_of(file) for file in model.files}
                return {
                    "model": to_dict(model.config),
                    "source": {"file": Path(checkpoint).name, "sha256": sums},
                    "magma_jax": __version__,
                }

            write_model_folder(out, metadata, model.params, extras, progress)
    return model.config


def to_torch(folder: str | Path, checkpoint: str | Path) -> None:
    """Writes a model folder as a PyTorch checkpoint in the published layout, layer by layer.

    Raises:
        FileExistsError: something already stands at ``checkpoint``. CheckpointError: no model folder.
        OutputError: the disk is too small.
    """
    _absent(checkpoint)
    model = open_model_folder(folder)
    module = published_module(model)
    if model.tokenizer.to_json() != gpt2_tokenizer().to_json():
        print(
            f"{checkpoint}: has no place for the vocabulary of {folder}, which is not GPT-2's; from-torch takes it by "
            f"--tokenizer {Path(folder) / 'tokenizer'}",
            file=sys.stderr,
        )
    with writing(checkpoint, nbytes_of({alias_key(tensor): tensor for tensor in module.values()})) as progress:
        write_torch_file(checkpoint, {"module": module, **model.source.get("counters", {})}, progress)


def to_safetensors(folder: str | Path, out: str | Path) -> None:
    """Writes a model folder as one safetensors file with the published keys, without buffers and second names.

    The config, and a vocabulary that is not GPT-2's, go into the file's metadata: ``open_torch_magma`` needs no other.

    Raises: as ``to_torch``.
    """
    _absent(out)
    model = open_model_folder(folder)
    rules = [entry for entry in magma_table(model.config) if isinstance(entry, Rule)]
    tensors = keymap.to_theirs(rules, model.params)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(to_dict(model.config)), "magma_jax": __version__}
    if (words := model.tokenizer.to_json()) != gpt2_tokenizer().to_json():
        metadata[TOKENIZER_KEY] = words
    with writing(out, nbytes_of(tensors)) as progress:
        write_safetensors(out, tensors, metadata, progress)


def open_model_folder(folder: str | Path) -> OpenMagma:
    """Config and parameters of a model folder or a trained run, in the dtypes it stores.

    The parameters of a model folder are read when asked for; what a run has trained is read at once.
    """
    folder = Path(folder)
    config = from_dict(MagmaConfig, read_model_json(folder)["model"], "model.json: model")
    shapes, types = abstract_model(config)
    params = open_params(folder)
    if misfits := [path for path in shapes if path not in params or params[path].shape != shapes[path].shape]:
        raise CheckpointError(f"{folder}: does not fit its config in {', '.join(misfits[:5])}; write it again")
    params = {path: params[path] for path in shapes} | read_what_was_trained(folder, shapes, types)
    source: dict[str, Any] = {}
    if (folder / TORCH_FILE).exists():
        source = _read_source(folder)
    return OpenMagma(config, params, source, (folder,), load_tokenizer(folder))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The vocabulary of a model folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(folder) / "tokenizer"
    try:
        return Tokenizer.load(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no vocabulary ({error}); write the folder again") from None


def _tokenizer_in(others: Mapping[Any, Any]) -> Tokenizer:
    words = others.get(TOKENIZER_KEY)
    return Tokenizer.from_json(words) if isinstance(words, str) else gpt2_tokenizer()


def _read_source(folder: Path) -> dict[str, Any]:
    try:
        source = read_json(folder / TORCH_FILE)
        if not isinstance(source["counters"], dict) or not all(isinstance(key, str) for key in source["keys"]):
            raise ForeignError("does not hold counters and keys")
    except (OSError, ForeignError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / TORCH_FILE}: {error}; convert the checkpoint again") from None
    try:
        with open(open_regular(folder / BUFFER_FILE), "rb") as file, np.load(file, allow_pickle=False) as buffers:
            sizes = [info.file_size for info in buffers.zip.infolist()]
            if sum(sizes) > _MAX_BUFFER_NBYTES:
                raise ValueError(f"it claims to hold {sum(sizes)} bytes")
            return source | {"buffers": dict(buffers)}
    except (*BAD_NPZ, OSError) as error:
        raise CheckpointError(f"{folder / BUFFER_FILE}: {error}; convert the checkpoint again") from None


def _absent(path: str | Path) -> None:
    if Path(path).exists():
        raise FileExistsError(f"{path}: already exists; choose another name or remove it first")


def _is_json(value: object) -> bool:
    """Whether a counter of a checkpoint can be kept; not one that nobody can walk through, or that is no Unicode."""
    try:
        check_tree(value)
        text = json.dumps(value, ensure_ascii=False)
        return len(text.encode()) <= MAX_TEXT_NBYTES and json.loads(text) == value
    except (TypeError, ValueError):
        return False


def _check_types(tensors: Mapping[str, Any]) -> None:
    """Raises KeyMapError for 8-bit floats: without the scales that belong to them they are not the weights."""
    if small := [key for key, tensor in tensors.items() if "float8" in tensor.dtype.name]:
        raise keymap.KeyMapError(
            f"{len(small)} tensors are in 8-bit floats, such as {small[0]} ({tensors[small[0]].dtype.name}), which are "
            "not converted; save the checkpoint in half precision first"
        )


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
        if path in found and np.issubdtype(shape.dtype, np.floating) and "float" in next(iter(found[path])).name
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
        array = tensor.read()
        # A mask of as many positions as the file claims to have is made only if it is as large.
        if name == "bias" and array.shape != (1, 1, config.lm.context_length, config.lm.context_length):
            unusual[key] = np.array(array)
            continue
        if (name, tensor.dtype) not in usual:
            usual[name, tensor.dtype] = attention_buffers(config, tensor.dtype, (name,))[name]
        expected = usual[name, tensor.dtype]
        if array.tobytes() != expected.tobytes() or array.shape != expected.shape:
            unusual[key] = np.array(array)
    return unusual


def _second_name(key: str) -> str:
    return key.replace("lm.transformer.h.", "transformer.", 1)

"""LoRAs in PEFT's layout: ``adapter_config.json`` beside ``adapter_model.safetensors``.

PEFT names a LoRA by the module of Hugging Face's model that it belongs to, so its keys follow from the key table of the
language model: ``base_model.model.MODULE.lora_A.weight`` (rank, in) and ``...lora_B.weight`` (out, rank).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from magma_jax.foreign import read_json, shown
from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.adapters import is_adapter
from magma_jax.nn.lora import LoraConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.keymap.engine import KeyMapError, Rule, to_ours, to_theirs
from magma_jax.published.keymap.rules import match_theirs
from magma_jax.published.language_model_keys import language_model_table
from magma_jax.storage.files import open_tensors
from magma_jax.storage.safetensors_file import write_safetensors
from magma_jax.typing import Params

CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_ROOT = "base_model.model."
_PARTS = {"lora_A": "down", "lora_B": "up"}
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
# Where a LoRA comes from, how it was initialised and trained, and what its tensors show.
_WITHOUT_EFFECT = re.compile(
    r"""peft_version|task_type|auto_mapping|base_model_name_or_path|revision|inference_mode|layers_pattern|exclude_modules
    |fan_in_fan_out|megatron_core|qalora_group_size|ensure_weight_tying|init_lora_weights""",
    re.VERBOSE,
)
# Initialisations that leave the model's own weights as they are.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


class PeftError(ValueError):
    """A folder that holds no LoRA of this model; one line."""


def lora_table(config: LanguageModelConfig, lora: LoraConfig) -> list[Rule]:
    """Key table of a language model's LoRA; parameter paths without ``lm/``."""
    table = []
    for rule in language_model_table(config):
        if not isinstance(rule, Rule):
            continue
        name = rule.ours.removesuffix("/weight").rpartition("/")[2]
        if not rule.ours.startswith("layers/") or not rule.ours.endswith("/weight") or name not in lora.targets:
            continue
        module, ours = rule.theirs.removesuffix(".weight"), rule.ours.removesuffix("/weight")
        table += [
            Rule(f"{_ROOT}{module}.{theirs}.weight", f"{ours}/lora/{part}/weight", stack="layer")
            for theirs, part in _PARTS.items()
        ]
    return table


def read_lora(folder: str | Path, config: LanguageModelConfig) -> tuple[LoraConfig, Params]:
    """The config and the parameters of a LoRA for a language model; paths without ``lm/``.

    Raises:
        PeftError: no LoRA, one of another model, or one with settings that are not known here.
    """
    folder = Path(folder)
    file = folder / WEIGHTS_FILE
    file = file if file.is_file() else folder / OLD_WEIGHTS_FILE
    try:
        values = read_json(folder / CONFIG_FILE)
        with open_tensors(file) as weights:
            lora = _config(values, weights.tensors, config)
            shapes = abstract(lambda: Decoder(config, lora=lora, rngs=nnx.Rngs(0)))[1]
            wanted = {path: shape for path, shape in shapes.items() if is_adapter(path)}
            plan = to_ours(lora_table(config, lora), weights.tensors, wanted)
            return lora, {path: tensor.read() for path, tensor in plan.items()}
    except KeyMapError as error:
        # The report's headline and its first example.
        said = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise PeftError(f"{folder}: is a LoRA of another model: {said}") from None
    except OSError as error:
        missing = Path(error.filename or folder).name
        raise PeftError(f"{folder}: holds no LoRA in PEFT's layout ({missing} cannot be read)") from None
    except (ValueError, TypeError) as error:
        raise PeftError(f"{folder}: {error}") from None


def write_lora(folder: Path, config: LanguageModelConfig, lora: LoraConfig, params: Mapping[str, Any]) -> None:
    """Writes a LoRA into an existing folder, for PEFT; ``params`` are those of ``read_lora``."""
    table = lora_table(config, lora)
    modules = {rule.theirs.split(".lora_")[0].rpartition(".")[2] for rule in table}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": config.kind == "gpt2",  # Conv1D, as PEFT sets it
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / WEIGHTS_FILE, to_theirs(table, params), {"format": "pt"})


def _config(values: Any, tensors: Mapping[str, Any], config: LanguageModelConfig) -> LoraConfig:
    if not isinstance(values, Mapping) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, Mapping) else values
        raise PeftError(f"its {CONFIG_FILE} describes {shown(kind, 40)}, and only LORA is offered")
    if values.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise PeftError(f"init_lora_weights {shown(values['init_lora_weights'])} changes the model's own weights")
    # Everything else is a setting that is off, or one that may change what the model computes.
    for name, value in values.items():
        known = name in _READ or _WITHOUT_EFFECT.fullmatch(name)
        if not known and value not in (None, False, "none", [], {}):
            raise PeftError(f"{name} {shown(value, 60)} of its {CONFIG_FILE} is not offered here")
    places: Any = config.trunk().block.matrices
    table = lora_table(config, LoraConfig(targets=places))
    found = {rule.ours for rule in table for key in tensors if match_theirs(rule, key) is not None}
    if not found:
        raise PeftError(f"is a LoRA of another model: none of its tensors fits a {config.kind}, {_first(tensors)}")
    targets = tuple(name for name in places if any(f"/{name}/lora/" in path for path in found))
    return LoraConfig(
        rank=_number(values, "r", int),
        alpha=float(_number(values, "lora_alpha", float)),
        targets=targets,
        dropout=float(_number(values, "lora_dropout", float)),
        rank_stabilized=values.get("use_rslora") is True,
    )


def _number(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise PeftError(f"{name} {shown(value, 40)} of its {CONFIG_FILE} is no number")
    return value


def _first(tensors: Mapping[str, Any]) -> str:
    return f"such as {shown(next(iter(tensors)))}" if tensors else "it has none"

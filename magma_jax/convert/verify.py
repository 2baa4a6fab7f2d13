"""Verifies a conversion: runs a checkpoint on a golden file's inputs and compares with the original's results."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magma_jax.config import ConfigError
from magma_jax.convert.golden import Comparison, GoldenError, compare, read_golden
from magma_jax.convert.layouts import layout_of
from magma_jax.foreign import ForeignError, read_json, shown
from magma_jax.published.model_config_keys import MODEL_CONFIG_KEYS


@dataclasses.dataclass(frozen=True)
class Verification:
    """All comparisons, and the golden arrays that were not compared."""

    comparisons: list[Comparison]
    not_compared: list[str]

    @property
    def ok(self) -> bool:
        """Whether every comparison is within its tolerance."""
        return all(comparison.ok for comparison in self.comparisons)

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON output."""
        rows = [comparison.as_json() for comparison in self.comparisons]
        return {"ok": self.ok, "comparisons": rows, "not_compared": self.not_compared}

    def as_table(self) -> str:
        """One line per comparison, and a summary."""
        width = max(len(comparison.name) for comparison in self.comparisons)
        lines = [f"{'quantity':{width}}  {'difference':>10}  {'tolerance':>9}  {'measure':8}"]
        for c in self.comparisons:
            verdict = "ok" if c.ok else f"PAST TOLERANCE {c.note}".rstrip()
            limit, measure = c.tolerance
            lines.append(f"{c.name:{width}}  {c.difference:10.2e}  {limit:9.1e}  {measure:8}  {verdict}")
        failed = sum(not comparison.ok for comparison in self.comparisons)
        lines += [f"not compared: {name}" for name in self.not_compared]
        lines.append(f"{len(self.comparisons)} quantities compared, {failed} past tolerance")
        return "\n".join(lines)


def verify(checkpoint: str | Path, golden: str | Path, model_config: Mapping[str, Any] | None = None) -> Verification:
    """Runs a checkpoint in fp32 on a golden file's inputs.

    Args:
        checkpoint: PyTorch file in a published layout, or a model or run folder.
        golden: file of named arrays, see ``golden_run`` and ``layouts``.
        model_config: values that cannot be inferred from tensors (``published.infer_config``), and ``eos_token``,
            ``image_token`` and ``opt_groups`` of the golden run; default: the ``.json`` beside the golden file, if any.

    Raises:
        GoldenError: the golden file is unreadable, does not fit the model or holds nothing to compare.
        ConfigError: the model config is unreadable.
        TorchFileError, InferenceError, KeyMapError, CheckpointError: the checkpoint cannot be read.
    """
    checkpoint, arrays = Path(checkpoint), read_golden(golden)
    beside = Path(golden).with_suffix(".json")
    if model_config is None and beside.is_file():
        model_config = read_model_config(beside)
    layout = layout_of(checkpoint)
    comparisons = [
        compare(name, value, arrays[name])
        for name, value in layout.quantities(checkpoint, arrays, model_config)
        if name in arrays
    ]
    if not comparisons:
        raise GoldenError(f"{golden}: holds nothing to compare; it has: {', '.join(sorted(arrays)[:20])}")
    order = {name: i for i, name in enumerate(arrays)}
    comparisons.sort(key=lambda comparison: order[comparison.name])
    not_compared = sorted(set(arrays) - layout.golden_inputs - {comparison.name for comparison in comparisons})
    return Verification(comparisons, not_compared)


def read_model_config(path: str | Path) -> dict[str, Any]:
    """Reads a model config file.

    Raises:
        ConfigError: it is missing, not JSON, or not an object.
    """
    path = Path(path)
    try:
        values = read_json(path)
    except OSError:
        raise ConfigError(f"{path}: no such model config file") from None
    except ForeignError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a model config is a JSON object, not a {type(values).__name__}")
    for part in MODEL_CONFIG_KEYS:
        if not isinstance(values.get(part, {}), dict):
            raise ConfigError(f"{path}: {part!r} must be an object, got {shown(values[part])}")
    return values

"""The model card of an exported folder, in the format of Hugging Face's hub."""

from collections.abc import Mapping
from typing import Any


def model_card(
    name: str, family: str, about: Mapping[str, Any], counts: Mapping[str, int], results: Mapping[str, Any]
) -> str:
    """The text of a ``README.md``.

    Args:
        name: name of the folder.
        family: family of the model.
        about: content of ``model.json``.
        counts: number of parameters by role.
        results: content of a run's ``results.json``; empty for none.
    """
    parts = [
        "---\nlibrary_name: magma_jax\ntags:\n"
        f"- {family}\n- jax\n# Name the licence of the weights; that of their data and sources may bind it.\n"
        "license: other\n---\n",
        f"# {name}\n",
        f"A {family} model, written by magma_jax {about.get('magma_jax', '')}.\n",
        f'```python\nfrom magma_jax.families import open_generator\n\nmodel = open_generator("{name}")\n```\n',
        _table("Parameters", ("role", "number"), [(role, f"{count:,}") for role, count in counts.items()]),
    ]
    if training := _training(about.get("run") or {}):
        parts.append(_table("Training", ("setting", "value"), training))
    if sources := _flat(about.get("source") or {}):
        parts.append(_table("Sources of the weights", ("source", "value"), sources))
    if figures := _figures(results):
        split = (results.get("protocol") or {}).get("split", "")
        parts.append(_table(f"Figures on the held-out split {split}".rstrip(), ("figure", "value"), figures))
    parts.append(
        "## Licences\n\nmagma_jax itself is under Apache-2.0. The licence of these weights follows from the data and\n"
        "the published weights above; write it here, and in the head of this file.\n"
    )
    return "\n".join(parts)


def _training(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the weights depend on."""
    if not run:
        return []
    names = ("steps", "batch_size", "seed", "weights", "base")
    rows = [(name, str(run[name])) for name in names if run.get(name) not in (None, {}, [])]
    rows += [(f"data.{name}", str(value)) for name, value in (run.get("data") or {}).items() if name != "cache_dir"]
    optim = run.get("optim") or {}
    rows += [(f"optim.{name}", str(optim[name])) for name in ("learning_rate", "schedule") if name in optim]
    return rows


def _figures(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = {name: value for name, value in results.items() if isinstance(value, int | float)}
    return [(name, f"{value:.4g}") for name, value in found.items() if not isinstance(value, bool)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in values.items():
        path = f"{prefix}{name}"
        rows += _flat(value, f"{path}.") if isinstance(value, Mapping) else [(path, str(value))]
    return rows


def _table(title: str, head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"

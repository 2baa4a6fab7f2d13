"""Vocabularies that put a space before every text, such as those of Llama 2, Mistral's first version and Phi-3.

A text here is often a part of one, between images or behind a prompt, so the space is taken out of the tokenizer and
put before the first text of a sequence instead. Then decoding inverts encoding for these vocabularies too.
"""

import json
from typing import Any, Literal

import tokenizers

# Before every text, or before those that do not begin with a space.
SpaceBefore = Literal["always", "unless there"]


def take_out_space(backend: tokenizers.Tokenizer) -> SpaceBefore | None:
    """Changes a tokenizer so that it puts no space before a text; returns when it did, None for never."""
    found: set[SpaceBefore] = set()
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        step = getattr(backend, part)
        if step is None or (part == "decoder" and not found):
            continue
        content = json.loads(step.__getstate__())
        changed = _without(content, found)
        if changed == content:
            continue
        if changed is not None:
            step.__setstate__(json.dumps(changed).encode())
        setattr(backend, part, step if changed is not None else None)
    return "always" if "always" in found else "unless there" if found else None


def _without(step: dict[str, Any], found: set[SpaceBefore]) -> dict[str, Any] | None:
    """A step of a tokenizer that neither adds nor removes a first space; None if it does nothing else."""
    kind = step["type"]
    if kind == "Sequence":
        name = next(name for name in ("normalizers", "pretokenizers", "decoders") if name in step)
        inner = [_without(one, found) for one in step[name]]
        return {**step, name: [one for one in inner if one is not None]}
    if kind == "Prepend":
        found.add("always")
        return None
    if kind == "Strip" and step.get("content") == " ":  # of a decoder; a normalizer's has no content
        return None
    if kind == "Metaspace" and step["prepend_scheme"] != "never":
        found.add("unless there")
        return {**step, "prepend_scheme": "never"}
    # In a decoder it has no effect.
    if kind == "ByteLevel" and step["add_prefix_space"]:
        found.add("unless there")
        return {**step, "add_prefix_space": False}
    return step

"""Writes GGUF files as llama.cpp lays them out, and wrong ones."""

import struct

import numpy as np

from magma_jax.storage.gguf.tensors import TYPES

NUMBER = {kind.name: number for number, kind in TYPES.items()}


def text(value):
    content = value.encode()
    return struct.pack("<Q", len(content)) + content


def value_of(value):
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + np.asarray(value, "<i4").tobytes()


def gguf_bytes(metadata, tensors, alignment=32):
    """A file; ``tensors`` are name -> array, or (name of the element type, shape, bytes)."""
    records, body = b"", b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
            tensor = names[tensor.dtype.name], tensor.shape, tensor.tobytes()
        kind, shape, content = tensor
        body += b"\0" * (-len(body) % alignment)
        number = NUMBER.get(kind, kind)
        records += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, len(body))
        body += content
    entries = b"".join(text(key) + value_of(value) for key, value in metadata.items())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + entries + records
    return head + b"\0" * (-len(head) % alignment) + body


def write_gguf(path, metadata, tensors):
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path

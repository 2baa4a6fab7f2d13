"""Names of result files: readable, and different for any two different evaluations."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# File names are limited to 255 bytes on most systems.
_READABLE = 100


def file_stem(what: str, settings: Mapping[str, Any], everything: Any) -> str:
    """``vqav2-4shot-limit=500-1c9e2f0a``: kind of content, non-default settings, and a hash.

    Args:
        what: kind of content, such as task and number of shots.
        settings: settings to show, as far as a file name allows.
        everything: JSON values of everything that the content depends on, for the hash.
    """
    shown = "-".join(f"{name}={_plain(value)}" for name, value in settings.items())[:_READABLE]
    digest = hashlib.blake2b(json.dumps(everything, sort_keys=True).encode(), digest_size=4).hexdigest()
    return "-".join(filter(None, [what, shown, digest]))


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isascii() and (c.isalnum() or c in ".,_") else "_" for c in text)

"""VLMEvalKit's class for OpenAI-compatible servers, on held-out questions in the wording of its datasets.

The package imports all of its models and datasets; two empty packages in front of it restrict this to the class.
"""

import importlib.util
import sys
import types
from pathlib import Path

from checks import MODEL, URL, questions, tell_answers, worded

found = importlib.util.find_spec("vlmeval")
assert found is not None
PACKAGE = Path(next(iter(found.submodule_search_locations or ())))
for name, folder in {"vlmeval": PACKAGE, "vlmeval.api": PACKAGE / "api"}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(folder)]

from vlmeval.api.gpt import OpenAIWrapper  # noqa: E402  # pyright: ignore[reportMissingImports]  # installed in its own environment

# Requests 2,048 tokens, its default.
model = OpenAIWrapper(MODEL, api_base=f"{URL}/chat/completions", key="none", retry=1, wait=0)
ROWS = questions()
tell_answers(
    [
        model.generate([{"type": "image", "value": row["picture"]}, {"type": "text", "value": worded(row)}])
        for row in ROWS
    ]
)

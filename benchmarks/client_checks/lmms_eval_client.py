"""lmms-eval's class for OpenAI-compatible servers, on held-out questions in the wording of its tasks."""

from checks import MODEL, URL, questions, tell_answers, worded
from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]  # installed in its own environment
from lmms_eval.models.chat.openai import OpenAICompatible  # pyright: ignore[reportMissingImports]  # installed in its own environment
from PIL import Image

ROWS = questions()


def messages(row: dict) -> list[dict]:
    """Messages as from a task's ``doc_to_messages``."""
    image = Image.open(row["picture"]).convert("RGB")
    return [
        {
            "role": "user",
            "content": [{"type": "image", "url": image}, {"type": "text", "text": worded(row)}],
        }
    ]


model = OpenAICompatible(model_version=MODEL, base_url=URL, api_key="none", timeout=120, max_retries=1)
model.task_dict = {"held_out": {"test": ROWS}}
# Without max_new_tokens, like many tasks: the class then requests 1,024 tokens.
requests = [
    Instance(
        request_type="generate_until",
        arguments=(worded(row), messages, {}, index, "held_out", "test"),
        idx=0,
        metadata={"task": "held_out", "doc_id": index, "repeats": 1},
    )
    for index, row in enumerate(ROWS)
]
tell_answers([result.text for result in model.generate_until(requests)])

"""Provenance of results, as text."""

from collections.abc import Mapping
from typing import Any

from magma_jax.evaluation.metrics.bootstrap import notes_on
from magma_jax.evaluation.results.columns import first_score


def title(task: Mapping[str, Any]) -> str:
    """``vqav2, 4 shots``, of a stored task."""
    return f"{task['name']}, {counted(task['shots'])}"


def counted(shots: int) -> str:
    """``1 shot``, ``2 shots``."""
    return f"{shots} shot{'' if shots == 1 else 's'}"


def stamp(result: Mapping[str, Any]) -> str:
    """Everything that a score depends on, in a few lines."""
    task, shots = result["task"], result["shots"]
    drawn = "none"
    if shots:
        each = "one draw for all" if task["shot_policy"] == "run" else "drawn for every query"
        drawn = f"{task['shots']} of {shots['data']}, {each}, seed {task['seed']}, {shots['dropped']} dropped"
        drawn += f"; the prompt, {task['before_answer']!r}, the answer, {task['after_answer']!r}"
    score = first_score(result, "scores")
    words = [
        title(task),
        f"  protocol    {task['protocols'][0]}",
        *(f"  also        {name}: {_scores(other)}" for name, other in result["scores"].items() if other != score),
        f"  data        {result['data']}: {result['samples']} of {result['of']}",
        f"  prompt      {task['prompt']!r}",
        f"  shots       {drawn}",
        f"  decoding    {result['decoding']}, at most {task['max_new_tokens']} new tokens",
        f"  truncation  {task['truncation']}",
        *([] if result["context"] is None else [_positions(result)]),
        *([f"  commonest   always {score['commonest']['answer']!r}, the most frequent true answer"] if score else []),
        *(f"  note        {note}" for note in (notes_on(score["scores"]) if score else ())),
        *([] if not task["blind"] else ["  images    black"]),
        f"  checkpoint  {', '.join(f'{key} {value}' for key, value in result['checkpoint'].items())}",
    ]
    return "\n".join(words)


def _positions(result: Mapping[str, Any]) -> str:
    """Not of a model that describes an image without a prompt, whose context is None."""
    past = result["longest_prompt"] + result["task"]["max_new_tokens"] > result["context"]
    return f"  positions   up to {result['longest_prompt']} of {result['context']}" + (
        ", beyond what the model was trained on" if past else ""
    )


def _scores(score: Mapping[str, Any]) -> str:
    """Scores under another protocol, with intervals."""
    scores = ((name, value, *score["intervals"][name]) for name, value in score["scores"].items())
    return ", ".join(f"{name} {value:.4g} ({low:.4g} to {high:.4g})" for name, value, low, high in scores)

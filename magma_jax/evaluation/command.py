"""Commands of eval.py: tasks, comparison, perplexity."""

import argparse
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from magma_jax.config import ConfigError, apply_overrides, from_dict, to_dict
from magma_jax.data.datasets import DataConfig, load_dataset, read_stored_config
from magma_jax.data.openmoji.dataset import OpenmojiConfig
from magma_jax.data.workers import cores
from magma_jax.evaluation.images.drawing import draw_task, options_of, write_image_result
from magma_jax.evaluation.images.task import IMAGE_TASKS, ImageTaskConfig
from magma_jax.evaluation.knowledge.measure import measure_knowledge
from magma_jax.evaluation.knowledge.measure import table as knowledge_table
from magma_jax.evaluation.metrics.perplexity import measure
from magma_jax.evaluation.report import comparison
from magma_jax.evaluation.report.comparison_page import write_comparison
from magma_jax.evaluation.report.results_card import write_card
from magma_jax.evaluation.report.run_report import OPENMOJI
from magma_jax.evaluation.report.task_files import write_result
from magma_jax.evaluation.tasks.describing import describe_task
from magma_jax.evaluation.tasks.few_shot import TaskResult, evaluate_task
from magma_jax.evaluation.tasks.sweep import combinations, run_sweep, sweep_table, write_sweep
from magma_jax.evaluation.tasks.task import TASKS, TaskConfig
from magma_jax.inference.generator import Generator, ImageGenerator, TokenGenerator
from magma_jax.output import printable
from magma_jax.runtime.distributed import barrier, is_main
from magma_jax.runtime.sharding import MeshConfig, make_mesh
from magma_jax.storage.hub import local_path
from magma_jax.storage.model_folder import MODEL_FILE, read_model_json
from magma_jax.training.checkpoints.checkpoint import CHECKPOINTS, RunCheckpoints

# Type of ``families.open_token_generator``, which is in a higher layer.
OpenModel: TypeAlias = Callable[..., TokenGenerator]


def run_comparison(arguments: argparse.Namespace) -> None:
    """``--compare``: tests whether one result is better than another."""
    found = comparison.compare_results(arguments.compare)
    if arguments.html is not None:
        write_comparison(arguments.html, found)
    print(json.dumps(found.to_json(), indent=2) if arguments.json else printable(found.table()))


def run_perplexity(open_model: OpenModel, arguments: argparse.Namespace) -> None:
    """``--perplexity``: checks that the language model is intact."""
    model = open_model(arguments.checkpoint or arguments.workdir, dtype=arguments.dtype, ema=arguments.ema)
    found = measure(model, arguments.perplexity)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for name, title in (("model", "with adapters"), ("without_adapters", "without adapters")):
        if name in found:
            values = found[name]
            print(
                f"{title if 'without_adapters' in found else 'no adapters':<18}perplexity {values['perplexity']:.4f} "
                f"a token, {values['bits_per_byte']:.4f} bits a byte, {values['tokens']} tokens"
            )


def run_knowledge(open_model: OpenModel, arguments: argparse.Namespace) -> None:
    """``--knowledge``: asks what no caption says; a table and a ``knowledge-N-shots.json`` for each number of shots."""
    path = Path(arguments.workdir)
    model = open_model(path, dtype=arguments.dtype, ema=arguments.ema)
    dataset = load_dataset(own_data(path))
    folder = arguments.output or path / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    for shots in arguments.shots or [0]:
        found = measure_knowledge(
            model, dataset, shots=shots, limit=arguments.limit, batch_size=arguments.batch_size
        ) | {"checkpoint": identify(path), "limit": arguments.limit}
        name = f"knowledge-{shots}-shots" + ("" if arguments.limit is None else f"-limit={arguments.limit}")
        text = json.dumps(found, indent=2)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(text if arguments.json else printable(f"{knowledge_table(found)}\n"))


def run_tasks(open_token_model: OpenModel, open_any: Callable[..., Generator], arguments: argparse.Namespace) -> None:
    """Evaluates, writes the files and prints the card; ``open_...`` are those of ``families``.

    Captions and questions without shots are asked of any family, images of those that draw, all else of those that
    write token by token.

    Raises:
        ValueError: one line that says what is wrong. Errors of the package are subclasses.
    """
    tasks = [task for name in arguments.task if name in TASKS for task in configure(name, arguments)]
    drawn = [configure_images(name, arguments) for name in arguments.task if name in IMAGE_TASKS]
    if drawn and (arguments.sweep or arguments.shots or arguments.distributed):
        raise ConfigError(f"{drawn[0].name}: leave out --sweep, --shots and --distributed, which are for texts")
    mesh = None
    if arguments.mesh is not None or arguments.distributed:
        mesh = make_mesh(from_dict(MeshConfig, apply_overrides(ConfigDict(), arguments.mesh or []), "mesh"))
    path = local_path(arguments.checkpoint or arguments.workdir)
    checkpoint = identify(path) | ({"dtype": arguments.dtype} if arguments.dtype else {})
    checkpoint |= {} if arguments.ema is None else {"ema": arguments.ema}
    described = all(task.kind in ("caption", "question") and not task.shots for task in tasks)
    opened = (open_any if described else open_token_model)(path, dtype=arguments.dtype, mesh=mesh, ema=arguments.ema)
    tasks = [with_classes_of(task, path) for task in tasks]
    own = own_data(path) if any(task.data is None for task in (*tasks, *drawn)) else None
    dataset = own and load_dataset(own)
    folder = arguments.output or (path if path.is_dir() else arguments.workdir) / "evaluation"
    common = {
        "dataset": dataset,
        "workers": cores() if arguments.workers is None else arguments.workers,
        "stamp": {"checkpoint": checkpoint},
    }
    for task in drawn:
        if not isinstance(opened, ImageGenerator):
            raise ConfigError(f"{path}: this model draws no images, which {task.name} takes")
        result = draw_task(opened, task, **common)
        written = write_image_result(folder, result)
        print(printable(f"wrote {written}\n\n{result.table()}\n"))
    if not tasks:
        return
    if isinstance(opened, TokenGenerator):
        size = {"batch_size": arguments.batch_size, "mesh": mesh}
        evaluate: Callable[[TaskConfig], TaskResult] = functools.partial(evaluate_task, opened, **common, **size)
    elif isinstance(opened, ImageGenerator):
        evaluate = functools.partial(describe_task, opened, **common)
    else:
        raise ConfigError(f"{path}: this model writes no texts")
    if arguments.sweep:
        choices = {key: values for key, *values in arguments.sweep}
        if len(choices) < len(arguments.sweep):
            raise ConfigError("--sweep: a setting is there twice; give all of its values at once")
        for task in tasks:
            results = run_sweep(combinations(task, choices), evaluate, opened.tokenizer)
            if is_main():
                written = write_sweep(folder, results, list(choices))
                print(printable(f"wrote {written}\n\n{sweep_table(results, list(choices))}\n"))
            barrier("sweep written")
        return
    evaluated = {}
    for task in tasks:
        result = evaluate(task)
        # A model that describes without a prompt changes this setting.
        evaluated[json.dumps(result.task.settings)] = result.task.settings
        if is_main():
            drawings = task.data is None and isinstance(own, OpenmojiConfig)
            print(f"wrote {write_result(folder, result, OPENMOJI if drawings else '')}")
        # Other processes must not wait too long in the next task's collectives.
        barrier("result written")
    for settings in evaluated.values() if is_main() else ():
        card = write_card(folder, checkpoint, settings)
        print(printable(f"wrote {card}\n\n{card.read_text()}"))


def configure(name: str, arguments: argparse.Namespace) -> list[TaskConfig]:
    """Configs of a task, one per requested number of shots.

    Raises:
        ConfigError: an unknown setting, or a value out of range.
    """
    places = {"data": _folder_of(name, arguments.data), "shot_data": _folder_of(name, arguments.shot_data)}
    values = ConfigDict(to_dict(TASKS[name]) | {key: value for key, value in places.items() if value is not None})
    if arguments.limit is not None:
        values = apply_overrides(values, [f"limit={arguments.limit}"])
    if arguments.split != "test":
        values = apply_overrides(values, [f"split={arguments.split}"])
    task = from_dict(TaskConfig, apply_overrides(values, arguments.set), name)
    if task.name != name:
        raise ConfigError(f"--set name: the task's name stays {name}")
    try:
        return [dataclasses.replace(task, shots=shots) for shots in arguments.shots or [task.shots]]
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def configure_images(name: str, arguments: argparse.Namespace) -> ImageTaskConfig:
    """Config of a task of images.

    Raises:
        ConfigError: an unknown setting, or a value out of range.
    """
    values = ConfigDict(to_dict(IMAGE_TASKS[name]))
    data = _folder_of(name, arguments.data)
    given = [f"data={data}"] if data is not None else []
    given += [f"limit={arguments.limit}"] if arguments.limit is not None else []
    given += [f"split={arguments.split}"] if arguments.split != "test" else []
    task = from_dict(ImageTaskConfig, apply_overrides(values, [*given, *arguments.set]), name)
    if task.name != name:
        raise ConfigError(f"--set name: the task's name stays {name}")
    options_of(task)  # refuses values out of range before the weights are read
    return task


def _folder_of(task: str, folders: Sequence[str]) -> str | None:
    """The folder given for a task, or for all tasks."""
    named = dict(entry.split("=", 1) for entry in folders if _names_task(entry))
    common = [entry for entry in folders if not _names_task(entry)]
    if len(common) > 1:
        raise ConfigError(f"{common[0]} and {common[1]}: of several folders each needs its task, as in vqav2=FOLDER")
    return named.get(task, common[0] if common else None)


def _names_task(entry: str) -> bool:
    return "=" in entry and entry.split("=", 1)[0] in (*TASKS, *IMAGE_TASKS)


def with_classes_of(task: TaskConfig, path: Path) -> TaskConfig:
    """A classification task with the class names and order of the run's training data."""
    if task.kind != "class" or not (path / MODEL_FILE).is_file():
        return task
    trained = tuple((read_model_json(path).get("run") or {}).get("data", {}).get("classes", ()))
    if trained and sorted(trained) != sorted(task.classes):
        raise ConfigError(f"{path}: was trained on the classes {', '.join(trained)}; set classes to these names")
    return dataclasses.replace(task, classes=trained or task.classes)


def identify(path: Path) -> dict[str, Any]:
    """Identity of a checkpoint, to be stored with results."""
    if path.is_file():
        return {"name": path.name, "bytes": path.stat().st_size}
    if not (path / MODEL_FILE).is_file():
        return {"name": path.name}
    found: dict[str, Any] = {"name": path.resolve().name}
    if (path / CHECKPOINTS).is_dir():
        with RunCheckpoints(path) as checkpoints:
            found["step"] = checkpoints.result_step()
    return found | {"model_sha256": hashlib.sha256((path / MODEL_FILE).read_bytes()).hexdigest()[:16]}


def own_data(path: Path) -> DataConfig:
    """The data config of a run.

    Raises:
        ConfigError: not a run.
    """
    run = read_model_json(path).get("run") if path.is_dir() else None
    if run is None:
        raise ConfigError(f"{path}: not a run, so it has no data of its own; give --data")
    return read_stored_config(run["data"])

"""The launch pages: files that parse, commands that exist, and the statuses that schedulers act on."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from magma_jax import commands
from magma_jax.__main__ import COMMANDS
from magma_jax.commands import FOUND, STOPPED, UNUSABLE
from magma_jax.config import apply_overrides, load_config_file
from magma_jax.families import run_config
from tests.jobset import GKE_PAGE, job_after, job_set, job_set_after

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs/launch").glob("*.md"))
BLOCKS = [
    (page.stem, number, *block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S))
]
# What docs/launch says of every place, by the command that does it.
STEPS = {"plan", "convert", "data", "train", "eval"}


def commands_of(text: str) -> list[list[str]]:
    """The words of every ``magma-jax ...`` in a text, without what follows it in its line."""
    found = re.findall(r"\bmagma-jax (\w+)([^\n&|>\"']*)", text.replace("\\\n", " "))
    return [[name, *shlex.split(rest)] for name, rest in found]


def of_page(name: str, language: str) -> list[str]:
    return [text for page, _, kind, text in BLOCKS if (page, kind) == (name, language)]


def test_there_is_a_page_for_every_kind_of_machine():
    assert {page.stem for page in PAGES} == {"tpu_vm", "tpu_slice", "gpus", "slurm", "gke", "serving"}


@pytest.mark.parametrize(("page", "number", "language", "text"), BLOCKS, ids=lambda value: str(value)[:12])
def test_blocks_parse(page, number, language, text):
    if language == "bash":
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    elif language == "yaml":
        assert all({"kind", "scrape_configs"} & document.keys() for document in yaml.safe_load_all(text))
    elif language == "python":
        compile(text, page, "exec")
    else:
        assert language in ("ini", "nginx", "caddyfile")  # see serve/test_proxies.py


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "serving"], ids=lambda page: page.stem)
def test_a_page_goes_from_the_plan_to_the_export_by_commands_that_exist(page, tmp_path, monkeypatch):
    (config,) = of_page(page.stem, "python")
    (tmp_path / "run.py").write_text(config)
    found = [words for text in of_page(page.stem, "bash") for words in commands_of(text)]
    if page.stem == "gke":
        (container,) = job_set()["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        found.append(container["args"])
    assert {words[0] for words in found} == STEPS
    # What is prepared is what training reads.
    prepared = {word for words in found for word in words if "/models/" in word or "/data/" in word}
    values = load_config_file(tmp_path / "run.py")
    assert {values.base, *(path for paths in values.data.folders.values() for path in paths)} <= prepared

    # Arguments are read as the commands do, which then would run.
    monkeypatch.setattr(commands, "run", lambda name, work, **options: 0)
    for words in found:
        assert importlib.import_module(COMMANDS[words[0]][0]).main(words[1:]) == 0, words
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
        if "--config" in words:
            name = words[words.index("--config") + 1]
            config = load_config_file(tmp_path / "run.py" if name.endswith("/run.py") else name)
            settings = words[words.index("--set") + 1 :] if "--set" in words else []
            run_config(apply_overrides(config, settings))


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (143, True), (2, False), (1, False)])
def test_slurm_requeues_a_stopped_run_and_no_failed_one(tmp_path, status, requeued):
    """The script of the page, with programs in the places of SLURM's."""
    script = next(text for text in of_page("slurm", "bash") if text.startswith("#!/bin/bash"))
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").touch()
    for name, does in {"srun": f'echo "$@" > srun.txt; exit {status}', "scontrol": 'echo "$@" > scontrol.txt'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    script = script.replace("/shared/venv", str(tmp_path / "venv"))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == status
    assert (tmp_path / "srun.txt").read_text().startswith("--cpus-per-task=8 magma-jax train --config")
    assert (tmp_path / "scontrol.txt").exists() == requeued


@pytest.mark.parametrize(
    ("statuses", "evicted", "job", "job_set_does"),
    [
        ([0, 0, 0, 0], False, "complete", "complete"),
        ([STOPPED] * 4, False, "pods start again", "goes on"),
        ([STOPPED] * 4, True, "pods start again", "goes on"),
        ([137] * 4, True, "pods start again", "goes on"),
        ([134, 134, 134, 137], False, "BackoffLimitExceeded", "RestartJobSet"),
        ([FOUND, 134, 134, 134], False, "BackoffLimitExceeded", "RestartJobSet"),
        ([UNUSABLE] * 4, False, "PodFailurePolicy", "FailJobSet"),
    ],
)
def test_kubernetes_starts_a_stopped_run_again_and_no_unusable_one(statuses, evicted, job, job_set_does):
    spec = job_set()
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = spec["replicatedJobs"]
    assert job_after(replicated["template"]["spec"], statuses, evicted) == job
    assert job_set_after(spec, [job]) == job_set_does
    # Of several slices one that fails decides, and one that is done waits.
    assert job_set_after(spec, ["pods start again", job]) == ("goes on" if job == "complete" else job_set_does)


def test_slice_and_pods_have_the_same_number_of_chips():
    job = job_set()["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == rows * columns
    assert f"mesh.fsdp={rows * columns}" in container["args"]


def test_several_slices_are_as_many_jobs():
    text = GKE_PAGE.read_text()
    (section,) = re.findall(r"^## Several slices\n(.*?)^## ", text, re.M | re.S)
    (jobs,), (slices,) = re.findall(r"`replicas: (\d+)`", section), re.findall(r"mesh\.slice=(\d+)", section)
    assert jobs == slices
    assert len(re.findall(r"`v5e-\d`", section)) == int(slices)


@pytest.mark.parametrize("name", ["train", "serve"])
@pytest.mark.parametrize("device", ["cpu", "cuda12", "cuda13", "tpu", "gpu"])
def test_an_image_installs_what_its_device_needs(name, device, tmp_path):
    """The shell of the Dockerfile's longest step, with another program in the place of pip."""
    text = (ROOT / f"docker/{name}.Dockerfile").read_text()
    step = re.search(r"^RUN (case .*?[^\\])$", text, re.M | re.S)[1].replace("\\\n", "")
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device}
    done = subprocess.run(["sh", "-c", step], env=environment, capture_output=True, text=True, check=False)
    if device == "gpu":
        assert done.returncode == UNUSABLE
        assert done.stderr == "DEVICE is cpu, cuda12, cuda13 or tpu, not gpu\n"
        return
    words = done.stdout.split()
    assert words[:2] == ["install", "--no-cache-dir"]
    assert words[2].startswith("/opt/magma_jax")
    assert [word.startswith(f"jax[{device}") for word in words[3:]] == ([] if device == "cpu" else [True])
    # The program that is process 1 gets SIGTERM: no shell between.
    assert re.search(r'^ENTRYPOINT \["magma-jax"', text, re.M)

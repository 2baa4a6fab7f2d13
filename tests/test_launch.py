"""The launch pages: shell that parses, YAML that parses, and training commands whose configs and settings exist."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from magma_jax.commands import FOUND, STOPPED, UNUSABLE
from magma_jax.config import apply_overrides, load_config_file
from magma_jax.families import run_config

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs/launch").glob("*.md"))
BLOCKS = [
    (page.stem, number, *block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S))
]


def commands(text: str) -> list[list[str]]:
    """The words of every ``python ...`` in a text, without what follows it in its line."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"\bpython (train\.py|-m magma_jax\S*)([^\n&|>\"']*)", joined)
    return [[*program.split(), *shlex.split(rest)] for program, rest in found]


def test_there_is_a_page_for_every_kind_of_machine():
    assert {page.stem for page in PAGES} == {"tpu_vm", "tpu_slice", "gpus", "slurm", "gke", "serving"}


@pytest.mark.parametrize(("page", "number", "language", "text"), BLOCKS, ids=lambda value: str(value)[:12])
def test_blocks_parse(page, number, language, text):
    if language == "bash":
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    elif language == "yaml":
        assert all({"kind", "scrape_configs"} & document.keys() for document in yaml.safe_load_all(text))
    else:
        assert language in ("ini", "nginx", "caddyfile")  # see serve/test_proxies.py


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "serving"], ids=lambda page: page.stem)
def test_commands_name_configs_and_settings_that_exist(page):
    text = page.read_text()
    found = commands(text)
    for document in yaml.safe_load_all("\n".join(re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S))):
        if document and document["kind"] == "Job":
            command = document["spec"]["template"]["spec"]["containers"][0]["command"]
            found.append([word for part in command[1:] for word in part.split("=", 1 if part.startswith("--") else 0)])
    assert found
    for words in found:
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1])
        assert {word for word in words if word.startswith("--")} <= options(words[1] if words[0] == "-m" else "train")
        settings = words[words.index("--set") + 1 :] if "--set" in words else []
        config = load_config_file(ROOT / words[words.index("--config") + 1])
        run_config(apply_overrides(config, settings))


def options(program: str) -> set[str]:
    """The options that a program knows, as its source names them."""
    path = "train.py" if program == "train" else program.replace(".", "/") + "/__main__.py"
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', (ROOT / path).read_text()))


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (143, True), (2, False), (1, False)])
def test_slurm_requeues_a_stopped_run_and_no_failed_one(tmp_path, status, requeued):
    """The script of the page, with programs in the places of SLURM's."""
    script = next(text for page, _, _, text in BLOCKS if page == "slurm" and text.startswith("#!/bin/bash"))
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").touch()
    for name, does in {"srun": f'echo "$@" > srun.txt; exit {status}', "scontrol": 'echo "$@" > scontrol.txt'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == status
    assert (tmp_path / "srun.txt").read_text().startswith("--cpus-per-task=8 python train.py --config")
    assert (tmp_path / "scontrol.txt").exists() == requeued


def test_kubernetes_starts_a_stopped_run_again_and_no_unusable_one():
    """The rules that Kubernetes documents for a podFailurePolicy, and what the statuses of train.py meet."""
    text = next(text for page, _, language, text in BLOCKS if page == "gke" and language == "yaml")
    (job,) = (document["spec"] for document in yaml.safe_load_all(text) if document["kind"] == "Job")
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    rules = job["podFailurePolicy"]["rules"]
    for rule in rules:
        assert rule["action"] in ("FailJob", "FailIndex", "Ignore", "Count")
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if codes := rule.get("onExitCodes"):
            assert codes["operator"] in ("In", "NotIn")
            assert codes["values"] == sorted(set(codes["values"]))
            assert codes["operator"] == "NotIn" or 0 not in codes["values"]

    def action(status):
        found = (rule["action"] for rule in rules if status in rule.get("onExitCodes", {}).get("values", ()))
        return next(found, "Count")

    statuses = (STOPPED, UNUSABLE, FOUND)
    assert [action(status) for status in statuses] == ["Ignore", "FailJob", "Count"]
    assert "DisruptionTarget" in str(rules[0])

"""Kubernetes' documented rules for a JobSet, by which the tests read the one of docs/launch/gke.md."""

import re
from pathlib import Path
from typing import Any

import yaml

GKE_PAGE = Path(__file__).parent.parent / "docs/launch/gke.md"


def job_set() -> dict[str, Any]:
    """The ``spec`` of the page's JobSet."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", GKE_PAGE.read_text(), re.M | re.S)
    documents = [document for text in blocks for document in yaml.safe_load_all(text)]
    (found,) = (document for document in documents if document["kind"] == "JobSet")
    return found["spec"]


def job_after(spec: dict[str, Any], statuses: list[int], evicted: bool = False) -> str:
    """What becomes of an indexed Job whose pods end with these statuses, with 0 failures counted before.

    The first rule that matches a failed pod acts; a failure that no rule matches counts (pod failure policy).
    """
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["completions"] == spec["parallelism"]
    counted = 0
    for status in statuses:
        for rule in spec["podFailurePolicy"]["rules"]:
            # Exactly one kind of condition a rule, and 0 is no failure.
            assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
            codes = rule.get("onExitCodes", {"operator": "In", "values": []})
            assert codes["operator"] == "In"
            assert 0 not in codes["values"]
            conditions = [condition["type"] for condition in rule.get("onPodConditions", ())]
            if status in codes["values"] or (evicted and "DisruptionTarget" in conditions):
                if rule["action"] == "FailJob":
                    return "PodFailurePolicy"
                assert rule["action"] == "Ignore"
                break
        else:
            counted += status != 0
    if counted > spec["backoffLimit"]:
        return "BackoffLimitExceeded"
    return "pods start again" if any(statuses) or evicted else "complete"


def job_set_after(spec: dict[str, Any], jobs: list[str]) -> str:
    """What becomes of a JobSet whose Jobs ended as ``job_after`` says: the first failed one decides."""
    for reason in jobs:
        if reason in ("PodFailurePolicy", "BackoffLimitExceeded"):
            matching = [rule for rule in spec["failurePolicy"]["rules"] if reason in rule["onJobFailureReasons"]]
            return matching[0]["action"] if matching else "RestartJobSet"
    return "complete" if set(jobs) == {"complete"} else "goes on"


def container_status(returncode: int) -> int:
    """The exit code that Kubernetes reads of a container whose process Python saw end with ``returncode``."""
    return 128 - returncode if returncode < 0 else returncode

"""Checks the launch files against their publishers' own packages; by hand, they are large.

python3 -m venv .venv/published
.venv/published/bin/pip install skypilot==0.14.1 kubernetes-validate==1.37.0 \
    kubeflow-trainer-api==2.3.0 pyyaml
.venv/published/bin/python tests/launch/published.py
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import kubernetes_validate
import sky
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from sky.utils import common_utils, schemas

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
KUBERNETES = "1.37"


def main() -> None:
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    parsed = JobsetV1alpha2JobSet.from_dict(jobset)
    assert parsed is not None
    lost = sorted(leaves(jobset) - leaves(parsed.to_dict()))
    assert not lost, f"unknown to JobSet: {lost}"
    said("jobset.yaml", "kubeflow-trainer-api")
    for job in jobset["spec"]["replicatedJobs"]:
        # JobSet embeds Kubernetes' own JobTemplateSpec
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
        kubernetes_validate.validate(whole | job["template"], KUBERNETES, strict=True)
    said(f"its Job, strictly as of Kubernetes {KUBERNETES}", "kubernetes-validate")

    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    common_utils.validate_schema(task, schemas.get_task_schema(), "task: ")
    common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "resources: ")
    recovery = schemas.get_resources_schema()["properties"]["job_recovery"]["anyOf"][1]
    # the schema lets other names pass
    assert task["resources"]["job_recovery"].keys() <= recovery["properties"].keys()
    made = sky.Task.from_yaml_config(
        dict(task), env_overrides=[("WORKDIR", "gs://bucket/runs/demo")]
    )
    assert made.num_nodes == task["num_nodes"]
    said("skypilot.yaml", "skypilot")


def leaves(value: Any, path: str = "") -> set[str]:
    """Returns the path and value of everything in it."""
    if isinstance(value, dict):
        return {one for key in value for one in leaves(value[key], f"{path}/{key}")}
    if isinstance(value, list):
        return {one for i, item in enumerate(value) for one in leaves(item, f"{path}/{i}")}
    return {f"{path}={value}"}


def said(what: str, package: str) -> None:
    print(f"ok: {what} ({package} {importlib.metadata.version(package)})")


if __name__ == "__main__":
    main()

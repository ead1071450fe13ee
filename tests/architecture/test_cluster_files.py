"""The files of cluster/: what reads them would take them, and they say what the documentation says they do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
KUBERNETES = CLUSTER / "kubernetes"
SCRIPT = CLUSTER / "slurm/train.sbatch"
DOCKERFILES = sorted((CLUSTER / "docker").glob("*.Dockerfile"))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")))


def ray_cluster(name: str) -> dict[str, Any]:
    """The specification of the Ray cluster in a file."""
    (found,) = documents(name)
    spec: dict[str, Any] = found["spec"]
    return spec["rayClusterSpec"] if found["kind"] == "RayJob" else spec


def keys(value: Any, of: str) -> Iterator[Any]:
    """Values of a key, wherever it stands."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == of:
                yield inner
            yield from keys(inner, of)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner, of)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_up_takes_the_cloud_files(name: str) -> None:
    written = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))
    config = prepare_config(written)
    validate_config(config)
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    assert "RAY_AUTH_MODE=token" in " ".join(config["setup_commands"])
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    for command in (*config["setup_commands"], head, worker):
        lint(command)


def lint(script: str) -> None:
    done = subprocess.run(
        [BIN / "shellcheck", "--shell=bash", "--exclude=SC2086,SC2016", "-"],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_a_kubernetes_cluster_is_whole(name: str) -> None:
    spec = ray_cluster(name)
    assert set(spec) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray.__version__
    (workers,) = spec["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    for group in (spec["headGroupSpec"], workers):
        assert set(group) - {"groupName", "replicas", "minReplicas", "maxReplicas"} == {"rayStartParams", "template"}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["terminationGracePeriodSeconds"] >= 60
        assert container["livenessProbe"]["exec"]["command"] == container["readinessProbe"]["exec"]["command"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
        assert claim == documents("storage.yaml")[0]["metadata"]["name"]
    gpus = workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert workers["rayStartParams"]["num-gpus"] == gpus


def test_a_kubernetes_job_resumes_and_cleans_up() -> None:
    (job,) = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) == {
        "entrypoint",
        "submissionMode",
        "backoffLimit",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "rayClusterSpec",
    }
    assert job["spec"]["entrypoint"].endswith("--resume auto")
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True


def test_gangs_have_their_queues_and_fit_them() -> None:
    (job,), (cluster,) = documents("rayjob.yaml"), documents("raycluster.yaml")
    _, quota, queue = documents("kueue.yaml")
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": queue["metadata"]["name"]}
    assert queue["spec"]["clusterQueue"] == quota["metadata"]["name"]
    (volcano,) = documents("volcano.yaml")
    assert cluster["metadata"]["labels"] == {"volcano.sh/queue-name": volcano["metadata"]["name"]}
    (group,) = quota["spec"]["resourceGroups"]
    nominal = {entry["name"]: str(entry["nominalQuota"]) for entry in group["flavors"][0]["resources"]}
    assert nominal == volcano["spec"]["capability"]
    spec = ray_cluster("rayjob.yaml")
    (workers,) = spec["workerGroupSpecs"]
    for name, limit in nominal.items():
        wanted = amount(spec["headGroupSpec"], name) + workers["replicas"] * amount(workers, name)
        assert 0 < wanted <= int(limit.removesuffix("Gi")), name


def amount(group: Mapping[str, Any], name: str) -> int:
    (container,) = group["template"]["spec"]["containers"]
    return int(container["resources"]["requests"].get(name, "0").removesuffix("Gi"))


def test_the_slurm_script_is_clean_and_requeues_by_itself() -> None:
    lint(SCRIPT.read_text(encoding="utf-8"))
    options = re.findall(r"^#SBATCH (--.*)$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"--requeue", "--open-mode=append"} < set(options)
    assert any(option.startswith("--signal=B:TERM@") for option in options)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean_and_pinned(path: Path) -> None:
    done = subprocess.run([BIN / "hadolint", "--format=json", path], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [], done.stderr
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^FROM \S+:[\w.-]*\d+\.\d+[\w.-]*$", text, re.MULTILINE)
    assert re.search(r"^USER \d+$", text, re.MULTILINE)
    assert "index-url" not in text
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)


def test_no_file_holds_a_secret() -> None:
    for path in KUBERNETES.glob("*.yaml"):
        for variables in keys(list(yaml.safe_load_all(path.read_text(encoding="utf-8"))), "env"):
            assert all(not re.search("TOKEN|KEY|SECRET|PASSWORD", one["name"]) for one in variables)

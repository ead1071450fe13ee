"""The files of cluster/ are accepted by their readers, and match the documentation."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES_VERSION = "1.36"  # whose schemas the pods and the claim must follow, unknown keys refused
BIN = Path(sys.executable).parent
KUBERNETES = CLUSTER / "kubernetes"
SCRIPT = CLUSTER / "slurm/train.sbatch"
DOCKERFILES = sorted((CLUSTER / "docker").glob("*.Dockerfile"))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8")))


def ray_cluster(name: str) -> dict[str, Any]:
    """Return the specification of the Ray cluster in a file."""
    (found,) = documents(name)
    spec: dict[str, Any] = found["spec"]
    return spec["rayClusterSpec"] if found["kind"] == "RayJob" else spec


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_up_takes_the_cloud_files(name: str) -> None:
    written = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))
    config = prepare_config(written)
    validate_config(config)
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    assert "RAY_AUTH_MODE=token" in " ".join(config["setup_commands"])
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert f"spot_notice.sh {name}" in config["worker_start_ray_commands"][2]
    for command in (*config["setup_commands"], head, *config["worker_start_ray_commands"]):
        lint(command)


def lint(script: str) -> None:
    command = [BIN / "shellcheck", "--shell=bash", "--exclude=SC2086,SC2016", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


class Metadata(http.server.BaseHTTPRequestHandler):
    """The answers of AWS and Google Cloud on a spot machine: the third answer announces the end of the machine."""

    asked = 0

    def do_PUT(self) -> None:
        self.answer(200, b"t0ken")

    def do_GET(self) -> None:
        type(self).asked += 1
        if self.path == "/latest/meta-data/spot/instance-action" and self.headers["X-aws-ec2-metadata-token"]:
            self.answer(200 if self.asked > 2 else 404, b'{"action": "terminate"}')
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self.answer(200, b"TRUE" if self.asked > 2 else b"FALSE")
        else:
            self.answer(403, b"")

    def answer(self, code: int, text: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("cloud", "left_s"), [("aws", 110), ("gcp", 25)])
def test_a_spot_machine_that_the_cloud_reclaims_is_drained(tmp_path: Path, cloud: str, left_s: int) -> None:
    script = CLUSTER / "spot_notice.sh"
    lint(script.read_text(encoding="utf-8"))
    (tmp_path / "ray").write_text('#!/bin/sh\necho "$RAY_ADDRESS: $*"\n', encoding="utf-8")
    (tmp_path / "ray").chmod(0o755)
    Metadata.asked = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"METADATA": f"http://127.0.0.1:{server.server_port}", "LOOK_EVERY_S": "0.01"}
        env = {**os.environ, **here, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        said = subprocess.run([script, cloud], env=env, capture_output=True, text=True, timeout=60).stdout
        server.shutdown()
    assert Metadata.asked == 3
    assert "auto: drain-node --reason DRAIN_NODE_REASON_PREEMPTION" in said
    assert said.endswith(f"--deadline-remaining-seconds {left_s}\n")


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
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert not re.search("TOKEN|KEY|SECRET|PASSWORD", " ".join(variables))
        limit_s = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 60 <= limit_s < pod["terminationGracePeriodSeconds"]
        assert container["livenessProbe"]["exec"]["command"] == container["readinessProbe"]["exec"]["command"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
        assert claim == documents("storage.yaml")[0]["metadata"]["name"]
    gpus = workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert workers["rayStartParams"]["num-gpus"] == gpus


def test_pods_and_the_claim_follow_the_schema_of_kubernetes() -> None:
    (claim,) = documents("storage.yaml")
    kubernetes_validate.validate(claim, KUBERNETES_VERSION, strict=True)
    for spec in map(ray_cluster, ("rayjob.yaml", "raycluster.yaml")):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
            kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
            pod["spec"]["containers"][0]["resource"] = {}
            with pytest.raises(kubernetes_validate.ValidationError, match="'resource' was unexpected"):
                kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


def test_a_kubernetes_job_resumes_and_cleans_up() -> None:
    (job,) = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    known = "entrypoint submissionMode backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished rayClusterSpec"
    assert set(job["spec"]) == set(known.split())
    assert job["spec"]["entrypoint"].endswith(" --resume auto --supervise")
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
    assert {"--requeue", "--open-mode=append", "--exclusive", "--mem=0"} < set(options)
    assert "--resume auto --supervise &" in SCRIPT.read_text(encoding="utf-8")
    assert any(option.startswith("--signal=B:TERM@") for option in options)


def test_a_ray_process_that_ends_is_not_waited_for() -> None:
    (ready,) = re.findall(r"^ready\(\) \{.*?^\}\n", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    given = 'READY_WITHIN_S=10 told=false steps=(); fail() { echo "$1"; kill "${steps[@]}"; exit 3; }\n'
    steps = "sleep 60 > /dev/null & steps+=($!); true & steps+=($!); wait $!; ready both false\n"
    done = subprocess.run(["bash", "-c", given + ready + steps], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "both: a Ray process has ended; its output is above\n")


def scheduled(tool: str) -> tuple[dict[str, Any], str]:
    """Return the file of a scheduler, and the commands that each node runs."""
    file = yaml.safe_load((CLUSTER / f"{tool}.yaml").read_text(encoding="utf-8"))
    return file, file["run"] if tool == "skypilot" else "\n".join(file["commands"])


@pytest.mark.parametrize("tool", ["skypilot", "dstack"])
def test_a_scheduler_starts_the_same_script_on_each_node(tool: str) -> None:
    file, run = scheduled(tool)
    lint(run + file.get("setup", ""))
    assert 'cluster/node.sh "$CONFIG" run.dir=/runs ' in run
    for name in ("RLHF_RANK", "RLHF_NODES", "RLHF_HEAD"):
        assert re.search(rf"\b{name}=", run), name
    secrets = file["secrets"] if tool == "skypilot" else dict.fromkeys(word for word in file["env"] if "=" not in word)
    assert secrets == {"RAY_AUTH_TOKEN": None, "WANDB_API_KEY": None}, "values come from the user's environment"
    configs = file["envs"]["CONFIG"] if tool == "skypilot" else file["env"][0].removeprefix("CONFIG=")
    assert (ROOT / configs).is_file()
    assert "/runs" in (file["file_mounts"] if tool == "skypilot" else file["volumes"][0])


RAY = """#!/bin/bash
echo "ray $*" >> calls
case "$1 $3" in
  "start --head") trap "kill %1; echo ended >> calls; exit 0" TERM; sleep 60 & wait ;;
  "health-check "*) [ -z "$HEAD_IS_GONE" ] && { [ "$RLHF_RANK" != 0 ] || grep -q " --head" calls; } ;;
esac
"""


def on_a_node(folder: Path, *words: str, rank: int, **given: str) -> subprocess.CompletedProcess[str]:
    """Run node.sh among programs that write down their arguments, each to `calls`."""
    rlhf = '#!/bin/bash\necho "rlhf $*" >> calls\nexit 75\n'
    for name, text in {"ray": RAY, "rlhf": rlhf, "python": "#!/bin/bash\nexit 0\n"}.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    node = {"RLHF_RANK": str(rank), "RLHF_NODES": "2", "RLHF_HEAD": "10.0.0.1", "RAY_AUTH_TOKEN": "t", **given}
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **node}
    command = [CLUSTER / "node.sh", *words]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_first_node_runs_and_the_others_join(tmp_path: Path) -> None:
    lint((CLUSTER / "node.sh").read_text(encoding="utf-8"))
    assert on_a_node(tmp_path, "run.yaml", "train.steps=3", rank=0).returncode == 75, "the run's own exit code"
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert any("--block --head --node-ip-address=10.0.0.1 --port=6390" in call for call in calls)
    assert calls[-2:] == [
        "rlhf train run.yaml train.steps=3 cluster.address=10.0.0.1:6390 --resume auto --supervise",
        "ended",
    ]
    (tmp_path / "calls").unlink()
    assert on_a_node(tmp_path, "run.yaml", rank=1).returncode == 0
    joined = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert joined[0] == "ray health-check --address 10.0.0.1:6390"
    assert joined[1].startswith("ray start --block --address=10.0.0.1:6390 --min-worker-port=0")
    assert "--dashboard-agent-listen-port=6391" in joined[1]


def test_a_node_without_a_head_or_a_token_says_so(tmp_path: Path) -> None:
    alone = on_a_node(tmp_path, "run.yaml", rank=1, HEAD_IS_GONE="1", READY_WITHIN_S="1")
    assert (alone.returncode, alone.stderr) == (1, "node.sh: the head on 10.0.0.1: not within 1 s\n")
    without = on_a_node(tmp_path, "run.yaml", rank=0, RAY_AUTH_TOKEN="")
    assert (without.returncode, without.stderr) == (2, "node.sh: the variable RAY_AUTH_TOKEN is not set\n")
    assert on_a_node(tmp_path, rank=0).returncode == 2


READERS = {
    "skypilot": ("skypilot==0.14.1", "import sky; sky.Task.from_yaml(sys.argv[1])"),
    "dstack": (
        "dstack==0.22.5",
        "import yaml; from dstack._internal.core.models.configurations import parse_apply_configuration as parse; "
        "parse(yaml.safe_load(open(sys.argv[1])))",
    ),
}


@pytest.mark.slow  # installs the tool
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tool", READERS)
def test_a_scheduler_takes_its_file_and_refuses_an_unknown_key(tmp_path: Path, tool: str) -> None:
    package, read = READERS[tool]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "tool"], check=True, timeout=120)
    install = [tmp_path / "tool/bin/pip", "install", "--quiet", package]
    subprocess.run(install, check=True, timeout=900)
    env = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_TOKEN": "t", "WANDB_API_KEY": "k"}
    env.pop("PYTHONPATH", None)
    written = (CLUSTER / f"{tool}.yaml").read_text(encoding="utf-8")
    for text, is_right in ((written, True), (f"{written}\nunknown_key: 1\n", False)):
        (tmp_path / "file.yaml").write_text(text, encoding="utf-8")
        command = [tmp_path / "tool/bin/python", "-c", f"import sys; {read}", tmp_path / "file.yaml"]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) is is_right, done.stderr
        assert is_right or "unknown_key" in done.stderr


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

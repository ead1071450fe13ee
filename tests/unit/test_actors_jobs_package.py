"""A job's package has the listed and configured files, mistakes are refused, and silent clusters are reported."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import textwrap
import zipfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import actors.jobs.package
import actors.jobs.submit
import rlhf
from actors.jobs.entrypoint import ENVIRONMENT, take_environment
from actors.jobs.package import Project, project_of
from actors.jobs.submit import JobEnd, Jobs
from rlhf.cli import main
from rlhf.config.files.load import load
from rlhf.errors import UserError

RUN = """\
run: {name: demo, dir: /shared/runs}
policy: {model: "some/model"}
algorithm: {name: grpo}
data: {train: data/train.jsonl, eval: {heldout: held.csv}}
rollouts: {prompts_per_step: 4, samples_per_prompt: 4}
rewards:
  mine: {function: "rewards.py:close"}
train: {steps: 10, lr: 1e-6, sequences_per_update: 16}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without a repository, as the test's current folder. Any contact ends the test."""
    project = tmp_path / "project"
    for name, text in {
        "run.yaml": "base: configs/run.yaml\n",
        "configs/run.yaml": RUN,
        "configs/rewards.py": "def close(prompt, response): return 1.0\n",
        "data/train.jsonl": "{}\n",
        "held.csv": "prompt\n",
        "notes.md": "",
        ".gitignore": "data/\n*.log\n",
        "a.log": "",
        "runs/demo/metrics.jsonl": "",
        "models/m/config.json": "{}",
        "sweeps/rates/trials.jsonl": "",
        "package/models/code.py": "",
    }.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    monkeypatch.chdir(project)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    return project


def packed(*overrides: str, config: str = "configs/run.yaml") -> Project:
    return project_of(Path(config), overrides, load(config, overrides))


def names(*overrides: str, config: str = "configs/run.yaml") -> set[str]:
    return set(map(str, packed(*overrides, config=config).files))


def refused(*overrides: str, config: str = "configs/run.yaml") -> str:
    with pytest.raises(UserError) as caught:
        packed(*overrides, config=config)
    return str(caught.value)


EXPECTED = {
    *("run.yaml", "configs/run.yaml", "configs/rewards.py", "held.csv", "notes.md", ".gitignore"),
    "package/models/code.py",
    "data/train.jsonl",  # left out by .gitignore, and named
}


def test_files_go_by_gitignore_and_by_name(folder: Path) -> None:
    assert names() == EXPECTED
    (folder / "data" / "mine.py").write_text("from rlhf.algorithms.grpo import GRPO\n\n\nclass Mine(GRPO): ...\n")
    assert names("algorithm={name: 'data/mine.py:Mine'}") == EXPECTED | {"data/mine.py"}
    assert "absent.py" in refused("algorithm={name: 'absent.py:Mine'}")


def test_images_that_rows_name_go_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, rows = folder / "data" / "photos" / "a.png", folder / "data" / "train.jsonl"
    image.parent.mkdir()
    image.write_bytes(b"1" * 2**20)
    part = {"type": "image", "image": "photos/a.png"}
    others = ["data:image/png;base64,AA==", "https://a.example.org/b.png", "/shared/c.png"]
    prompt = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
    written = [{"messages": prompt}, {"prompt": "?", "images": others}, {"prompt": "?", "image": "ubuntu"}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    assert names() == EXPECTED | {"data/photos/a.png"}
    monkeypatch.setattr(actors.jobs.package, "LARGEST_MIB", 0.5)
    assert re.search(r"data\.train: .*name 1 images of 1 MiB, but at most 0\.5 .* absolute paths", refused())
    monkeypatch.undo()
    for wrong, why in (("../../a.png", "outside of the project"), ("photos/gone.png", "does not exist")):
        monkeypatch.chdir(folder)
        rows.write_text(json.dumps({"prompt": "?", "images": [wrong]}) + "\n")
        assert re.search(rf"data\.train: .*train\.jsonl:1: the image .* {why}.* absolute paths", refused())


def test_a_repository_inside_of_the_project_goes_too(folder: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    assert names() == EXPECTED
    inner = folder / "package" / "models"
    (inner / ".gitignore").write_text("*.bin\n")
    (inner / "large.bin").write_text("")
    subprocess.run(["git", "init", "--quiet"], cwd=inner, check=True)
    absent = ["git", "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},absent"]  # a submodule not fetched
    (folder / "absent").mkdir()
    subprocess.run(absent, cwd=folder, check=True)
    (folder / "elsewhere").symlink_to(folder.parent, target_is_directory=True)
    assert names() == EXPECTED | {"package/models/.gitignore"}


def test_run_folders_inside_of_the_project_stay(folder: Path) -> None:
    (folder / "out/demo").mkdir(parents=True)
    (folder / "out/demo/metrics.jsonl").write_text("")
    assert names(f"run.dir={folder / 'out'}") == EXPECTED
    (folder / "out/demo").rename(folder / "demo")
    for shared in (folder, folder.parent):  # only the run stays if runs and project share a folder
        project = names(f"run.dir={shared}")
        assert {"notes.md", "configs/rewards.py"} <= project
        assert ("demo/metrics.jsonl" in project) == (shared != folder)


def test_the_archive_holds_the_files_and_is_the_same_for_the_same_files(folder: Path, tmp_path: Path) -> None:
    os.chmod(folder / "notes.md", 0o755)
    packed().pack(tmp_path / "a.zip", env={})
    os.utime(folder / "held.csv", (1, 1))
    packed().pack(tmp_path / "b.zip", env={})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert set(archive.namelist()) == EXPECTED
        assert archive.getinfo("notes.md").external_attr >> 16 & 0o777 == 0o755
        assert archive.read("configs/run.yaml").decode() == RUN


def test_variables_travel_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORD", raising=False)
    take_environment()
    packed().pack(tmp_path / "a.zip", env={"WORD": "a\nb=c"})
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.getinfo(ENVIRONMENT).external_attr >> 16 & 0o777 == 0o600
        archive.extract(ENVIRONMENT)
    take_environment()
    assert os.environ["WORD"] == "a\nb=c"


def test_links_out_of_the_project_and_secrets_stay(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "shadow").write_text("root:hash")
    (folder / "shadow").symlink_to(tmp_path / "shadow")
    (folder / "notes-link.md").symlink_to(folder / "notes.md")
    secrets = [".env", ".env.local", "deploy/.netrc", ".aws/config", "ssh/id_ed25519", "tls/server.pem", ".ssh/config"]
    for name in [*secrets, ".env.example", ENVIRONMENT]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "innocent").symlink_to(folder / ".env")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[remote]")
    (folder / "remote").symlink_to(folder / ".git" / "config")
    project = packed()
    assert set(map(str, project.files)) == EXPECTED | {"notes-link.md", ".env.example"}
    assert f"\n  shadow: a link to {tmp_path / 'shadow'}, outside of the project" in caplog.text
    for name in [*secrets, "innocent", "remote"]:
        assert f"\n  {name}: it may hold secrets; `--env NAME` gives" in caplog.text
    project.pack(tmp_path / "a.zip", env={"WORD": "a"})
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist().count(ENVIRONMENT) == 1
        assert archive.read(ENVIRONMENT) == b'{"WORD": "a"}'


def test_a_file_that_the_configuration_names_goes_whatever_it_is_called(folder: Path, tmp_path: Path) -> None:
    (folder / "secrets.json").write_text("[]")
    assert "secrets.json" in names("data.train=secrets.json")
    saved = folder / "saved"
    saved.mkdir()
    (saved / "rows.arrow").write_text("")
    (tmp_path / "shadow").write_text("")
    (saved / "link").symlink_to(tmp_path / "shadow")
    assert names("data.train=saved") - EXPECTED == {"saved/rows.arrow"}


def test_the_files_of_a_pattern_come_along(folder: Path) -> None:
    for part in range(2):
        (folder / f"data/part-{part}.jsonl").write_text("{}\n")
    assert names("data.train=data/part-*.jsonl") - EXPECTED == {"data/part-0.jsonl", "data/part-1.jsonl"}
    assert "data.train: none-*.jsonl does not exist" in refused("data.train=none-*.jsonl")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.dir=runs"], ["run.dir: runs is relative", "project/runs"]),
        (["run.mirror=copies"], ["run.mirror: copies is relative", "project/copies"]),
        (["cluster.address=10.0.0.1:6379"], ["cluster.address", "'10.0.0.1:6379'", "remove the key"]),
        (["data.train=none.jsonl"], ["data.train: none.jsonl does not exist"]),
        (["data.train=../outside.jsonl"], ["data.train: ", "outside.jsonl is not below "]),
        (["data.eval={other: none.parquet}"], ["data.eval.other: none.parquet does not exist"]),
        (["rewards.mine.function=no.py:f"], ["rewards.mine.function: no.py does not exist"]),
        (["policy.model=models/m"], ["policy.model: models/m is a folder on this machine"]),
        (["policy.model=./elsewhere"], ["policy.model: ./elsewhere is a folder on this machine"]),
    ],
)
def test_what_the_job_would_miss_is_named(folder: Path, overrides: Sequence[str], words: Sequence[str]) -> None:
    (folder.parent / "outside.jsonl").write_text("{}\n")
    said = refused(*overrides)
    assert all(word in said for word in words), said


def test_stages_are_looked_through(folder: Path) -> None:
    run, rest = RUN.split("\n", 1)
    one = textwrap.indent(rest, "    ")
    two = one.replace("some/model", "stage:one")
    (folder / "configs/pipeline.yaml").write_text(f"{run}\nstages:\n  one:\n{one}  two:\n{two}")
    assert names(config="configs/pipeline.yaml") == EXPECTED | {"configs/pipeline.yaml"}
    message = refused("stages.two.data.train=none.jsonl", config="configs/pipeline.yaml")
    assert "stages.two.data.train: none.jsonl does not exist" in message


def test_a_config_from_elsewhere_and_a_recipe_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN.replace("rewards.py", str(folder / "configs/rewards.py")))
    assert re.search(r"run\.yaml is not below .*project", refused(config=str(tmp_path / "run.yaml")))
    recipe = refused("run.dir=/shared/runs", "policy.model=a/b", config="recipe:grpo_smollm2")
    assert re.search(r"is a recipe, but a job needs.*Write a file with the line `base: recipe:grpo_smollm2", recipe)


def test_too_much_is_refused_with_the_largest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.jobs.package, "LARGEST_MIB", 1)
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(3 * 2**20)
    said = refused()
    assert "has 3 MiB in 9 files, but at most 1 MiB" in said
    assert "weights.bin (3 MiB)" in said


def test_the_bases_travel_but_a_base_outside_of_the_project_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "data" / "base.yaml").write_text(RUN.replace("rewards.py:close", "../configs/rewards.py:close"))
    (folder / "derived.yaml").write_text("base: configs/middle.yaml\nrun: {name: derived}\n")
    (folder / "configs" / "middle.yaml").write_text("base: ../data/base.yaml\n")
    bases = {"derived.yaml", "configs/middle.yaml", "data/base.yaml", "configs/rewards.py"}
    assert names(config="derived.yaml") >= bases
    (tmp_path / "base.yaml").write_text(RUN.replace("rewards.py:close", "math_answer"))
    (folder / "derived.yaml").write_text("base: ../base.yaml\n")
    assert re.search(r"derived.yaml: base: .*base.yaml is not below ", refused(config="derived.yaml"))
    # a recipe is on every node
    (folder / "derived.yaml").write_text("base: recipe:grpo_smollm2\nrun: {dir: /shared/runs}\npolicy: {model: a/b}\n")
    assert "derived.yaml" in names(config="derived.yaml")


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a CONFIG to submit, or name a job with --follow, --status or --stop"),
        (["run.yaml", "--follow", "demo-1"], "take only a JOB and --address"),
        (["--stop", "demo-1", "--env", "X"], "take only a JOB and --address"),
        (["--status", "demo-1", "--stop", "demo-1"], "not allowed with argument"),
        (["run.yaml", "train.stps=3"], "did you mean train.steps?"),
        (["run.yaml", "run.dir=runs"], "run.dir: runs is relative"),
        (["run.yaml", "--env", "NOT_SET_HERE"], "--env NOT_SET_HERE: is not set in your environment"),
        (["run.yaml", "--env", "MINE=very-private-words"], "--env MINE: takes only the name of a variable"),
        (["run.yaml", "--address", "10.0.0.1:6379"], "10.0.0.1:6379 (--address or RAY_ADDRESS) is not the address"),
        (["run.yaml", "--address", "ray://10.0.0.1:10001"], "ray://10.0.0.1:10001 (--address or RAY_ADDRESS) is not"),
        (["run.yaml"], "no dashboard of Ray answers at http://127.0.0.1:1"),
        (["run.yaml", "--resource", "tpu"], "--resource: takes NAME=N, such as tpu=4, got 'tpu'"),
        (["run.yaml", "--resource", "tpu=-1"], "--resource tpu: got -1, expected a number >= 0"),
        (["run.yaml", "--memory-gib", "inf"], "--memory-gib: got inf, expected a number >= 0"),
        (["run.yaml", "run.mirror=https://me:very-private-words@store/runs"], "argument run.mirror: holds a secret"),
    ],
)
def test_what_is_wrong_is_said_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["submit", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1
    assert "very-private-words" not in err


def test_no_cluster_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    assert main(["submit", "run.yaml"]) == 2
    assert "no cluster is named: give --address http://HOST:8265" in capsys.readouterr().err


def test_who_says_nothing_is_not_waited_for(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.jobs.submit, "ANSWER_WITHIN_S", 0.2)
    with pytest.raises(rlhf.UserError, match=f"no dashboard of Ray answers at {silent} .*timed out"):
        rlhf.job_status("demo-1", address=silent)
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def test_values_are_hidden_in_whatever_a_cluster_says() -> None:
    jobs = object.__new__(Jobs)
    jobs._hidden = ("open", "open sesame", "no", "two\nlines")
    assert jobs._masked("it said open sesame, no more") == "it said ***, no more"
    assert jobs._message("refused:\ntwo\nlines, open") == "refused: ***, ***"
    # a value of several lines, in a log that arrives in parts
    jobs._hidden = ("-----BEGIN KEY-----\n  c2VjcmV0\n}\n-----END KEY-----\n",)
    assert jobs._masked("it has -----BEGIN KEY-----\n") == "it has ***\n"
    assert jobs._masked("c2VjcmV0\n}\n-----END KEY-----\n") == "***\n}\n***\n"


class Breaking:
    """A client whose log breaks off once in the middle, with an error or silently."""

    def __init__(self, *, over_at: int = 2, is_silent: bool = False) -> None:
        self.asked, self.over_at, self.is_silent = 0, over_at, is_silent

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.asked += 1
        yield "one\n"
        if self.asked == 1:
            yield "tw"
            if self.is_silent:
                await asyncio.sleep(600.0)
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield "two\nth"
        yield "ree\n"

    def get_job_info(self, job: str) -> SimpleNamespace:
        state = "RUNNING" if self.asked < self.over_at else "FAILED"
        return SimpleNamespace(status=state, driver_exit_code=75, message=None)


@pytest.mark.parametrize(("over_at", "is_silent"), [(2, False), (1, False), (1, True)])
def test_a_log_that_breaks_off_is_taken_up_where_it_was(
    monkeypatch: pytest.MonkeyPatch, over_at: int, is_silent: bool
) -> None:
    """The job ends after the break, or meanwhile."""
    monkeypatch.setattr(actors.jobs.submit, "HEARTBEAT_S", 0.2)
    jobs, told = object.__new__(Jobs), list[str]()
    jobs._hidden, jobs._client = (), Breaking(over_at=over_at, is_silent=is_silent)
    end = jobs.follow("demo-1", told.append)
    assert "".join(told) == "one\ntwo\nthree\n"
    assert (end.state, end.exit_code) == ("FAILED", 75)


def test_a_head_that_is_lost_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Breaking()
    info = Mock(side_effect=[client.get_job_info("demo-1"), *[ConnectionError("refused")] * 9])
    monkeypatch.setattr(client, "get_job_info", info)
    monkeypatch.setattr(actors.jobs.submit, "LOST_FOR_S", -1.0)
    jobs = object.__new__(Jobs)
    jobs._hidden, jobs._client, jobs.address = (), client, "http://head:8265"
    with pytest.raises(rlhf.RunError, match=r"no answer about demo-1 for .*it may still run: .*refused"):
        jobs.follow("demo-1", lambda text: None)


@pytest.mark.parametrize(("options", "end"), [([], " --supervise"), (["--no-supervise"], "")])
def test_the_driver_of_a_job_is_supervised(monkeypatch: pytest.MonkeyPatch, options: list[str], end: str) -> None:
    jobs = Mock()
    jobs.submit.return_value, jobs.follow.return_value = "demo-1", JobEnd(state="SUCCEEDED", exit_code=0, message="")
    made = Mock(return_value=jobs)
    monkeypatch.setattr(actors.jobs.submit, "Jobs", made)
    assert main(["submit", "run.yaml", "train.steps=3", "--wait", *options]) == 0
    made.assert_called_once()  # a second client would not mask the values of --env in the log
    command = f"exec python -m actors.jobs.entrypoint train run.yaml train.steps=3 --resume auto{end}"
    assert jobs.submit.call_args.args[2] == command

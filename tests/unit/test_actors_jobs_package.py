"""A job's package has the listed and the configured files, and refuses others."""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import actors.jobs.package
from actors.jobs.entrypoint import ENVIRONMENT, take_environment
from actors.jobs.package import Project, project_of
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
    """A project without a repository, as the test's current folder."""
    project = tmp_path / "project"
    for name, text in {
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
    *("configs/run.yaml", "configs/rewards.py", "held.csv", "notes.md", ".gitignore", "package/models/code.py"),
    "data/train.jsonl",  # left out by .gitignore, and named
}


def test_files_go_by_gitignore_and_by_name(folder: Path) -> None:
    assert names() == EXPECTED
    (folder / "data" / "mine.py").write_text("from rlhf.algorithms.grpo import GRPO\n\n\nclass Mine(GRPO): ...\n")
    assert names("algorithm={name: 'data/mine.py:Mine'}") == EXPECTED | {"data/mine.py"}
    assert "absent.py" in refused("algorithm={name: 'absent.py:Mine'}")


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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.dir=runs"], ["run.dir: runs is relative", "project/runs"]),
        (["run.mirror=copies"], ["run.mirror: copies is relative", "project/copies"]),
        (["cluster.address=10.0.0.1:6379"], ["cluster.address", "'10.0.0.1:6379'", "remove it"]),
        (["data.train=none.jsonl"], ["data.train: none.jsonl does not exist"]),
        (["data.train=../outside.jsonl"], ["data.train: ", "outside.jsonl is outside of the project"]),
        (["data.eval={other: none.parquet}"], ["data.eval.other: none.parquet does not exist"]),
        (["rewards.mine.function=no.py:f"], ["rewards.mine.function: no.py does not exist"]),
        (["policy.model=models/m"], ["policy.model: models/m is a folder of this machine"]),
        (["policy.model=./elsewhere"], ["policy.model: ./elsewhere is a folder of this machine"]),
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
    recipe = refused("run.dir=/shared/runs", "policy.model=a/b", config="grpo_smollm2.yaml")
    assert re.search(r"is a recipe and no file here.*Write one with the line `base: grpo_smollm2", recipe)


def test_too_much_is_refused_with_the_largest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.jobs.package, "LARGEST_MIB", 1)
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(3 * 2**20)
    said = refused()
    assert "has 3 MiB in 8 files, and at most 1 MiB" in said
    assert "weights.bin (3 MiB)" in said


def test_the_bases_travel_but_a_base_outside_of_the_project_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "data" / "base.yaml").write_text(RUN.replace("rewards.py:close", "../configs/rewards.py:close"))
    (folder / "derived.yaml").write_text("base: configs/middle.yaml\nrun: {name: derived}\n")
    (folder / "configs" / "middle.yaml").write_text("base: ../data/base.yaml\n")
    bases = {"derived.yaml", "configs/middle.yaml", "data/base.yaml", "configs/rewards.py"}
    assert names(config="derived.yaml") >= bases
    (tmp_path / "base.yaml").write_text(RUN.replace("rewards.py:close", "math_answer"))
    (folder / "derived.yaml").write_text("base: ../base.yaml\n")
    assert re.search(r"derived.yaml: base: .*base.yaml is outside of the project", refused(config="derived.yaml"))
    # a recipe is on every node
    (folder / "derived.yaml").write_text("base: grpo_smollm2.yaml\nrun: {dir: /shared/runs}\npolicy: {model: a/b}\n")
    assert "derived.yaml" in names(config="derived.yaml")

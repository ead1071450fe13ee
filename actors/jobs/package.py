"""The files of a submitted job: the files under the current folder, checked and packed without contact to a cluster.

Relative paths start at the project's folder, in the job as on this machine.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.jobs.entrypoint import ENVIRONMENT
from rlhf.config.derive import eval_sets, train_sets
from rlhf.config.files.base_file import read_tree
from rlhf.config.files.load import LoadedConfig
from rlhf.config.files.recipes import RECIPES
from rlhf.config.pipeline import model_places
from rlhf.config.schema.data import DataSource
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage
from rlhf.config.yaml_tree import apply_overrides
from rlhf.data.files import FILE_SUFFIXES
from rlhf.data.images import has_images, image_files
from rlhf.data.sources import open_shards
from rlhf.errors import UserError, prefix_errors

LARGEST_MIB = 100  # of all files together: Ray keeps the archive in the head's memory and unpacks it on every node
# Left out at the top of the folder, independent of .gitignore.
STAYS = frozenset({".git", ".venv", "evals", "models", "runs", "sweeps", "wandb"})
GIT_WITHIN_S = 60.0
# Files that usually hold secrets. They travel only if the configuration names them; --env gives a job single variables.
SECRETS = re.compile(
    r"\.env|\.env\.(?!example$|sample$|template$).+|[._]netrc|\.pgpass|\.pypirc|\.npmrc|\.git-credentials|\.htpasswd"
    r"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|.+\.(pem|key|p12|pfx|jks|keystore|kdbx)|credentials(\.json)?"
    r"|(client_)?secrets?\.(json|ya?ml|toml|env)",
    re.IGNORECASE,
)
SECRET_FOLDERS = frozenset({".aws", ".azure", ".git", ".gnupg", ".kube", ".ssh"})  # .git/config may hold a token
_SHARED = "Put the images on a disk that every node can read, and write absolute paths into the rows."
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same time for all files: Ray uploads equal archives only once

Key = tuple[str, ...]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """The files of a job, in order, relative to the folder."""

    folder: Path
    config: Path
    files: tuple[Path, ...]

    def pack(self, archive: Path, *, env: Mapping[str, str]) -> None:
        """Write the files as a zip file, with the variables for the start of the job's processes."""
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in self.files:
                entry = zipfile.ZipInfo(str(name), _EPOCH)
                entry.external_attr = ((self.folder / name).stat().st_mode & 0xFFFF) << 16
                packed.writestr(entry, (self.folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
            if env:
                entry = zipfile.ZipInfo(ENVIRONMENT, _EPOCH)
                entry.external_attr = 0o100600 << 16  # Ray unpacks files with these rights
                packed.writestr(entry, json.dumps(dict(env)))


def project_of(config: Path, overrides: Sequence[str], loaded: LoadedConfig) -> Project:
    """Return the project around a checked configuration: the current folder. UserError: the job would miss a file."""
    folder, whole = Path.cwd(), config.resolve()
    if not whole.is_file():
        raise UserError(
            f"{config} is a recipe, but a job needs a configuration file below {folder}. Write a file with the line "
            f"`base: {config}` and your changes."
        )
    if not whole.is_relative_to(folder):
        raise UserError(
            f"{config} is not below the current folder, {folder}, and a job gets only files of this folder. Change to "
            "the project's folder, and submit again."
        )
    _refuse_folders_of_this_machine(loaded)
    tree = read_tree(config)
    named = _named_files(tree, overrides, folder=folder, beside=whole.parent)
    for base in dict.fromkeys(path.resolve() for path in tree.bases):
        if base.is_relative_to(folder) or not base.is_relative_to(RECIPES.resolve()):  # a node has the recipes itself
            named |= _below(base, folder, f"{config}: base")
    named |= _image_files(loaded, folder)
    runs = [stage.run.dir for stage in loaded.stages.values() if not folder.is_relative_to(stage.run.dir)]
    stays = [folder / name for name in STAYS] + [*runs, loaded.folder]
    inside = {name for name in _listed(folder) if not any((folder / name).is_relative_to(place) for place in stays)}
    inside = _safe(inside, folder)
    files = tuple(sorted(inside | named | {whole.relative_to(folder)}))
    _refuse_too_large(folder, files)
    return Project(folder=folder, config=whole.relative_to(folder), files=files)


def _refuse_folders_of_this_machine(loaded: LoadedConfig) -> None:
    """Raise UserError for a run folder or a cluster that means something else in the job than here."""
    for stage in loaded.stages.values():
        mirror = stage.run.mirror
        named = {"dir": stage.run.dir} | ({} if mirror is None or "://" in mirror else {"mirror": Path(mirror)})
        for key, place in named.items():
            if not place.is_absolute():
                raise UserError(
                    f"run.{key}: {place} is relative, and the job's folder is a copy that Ray removes. Name a folder "
                    f"that every node can read; if the nodes share this disk, set run.{key}={place.absolute()}"
                )
        address = None if isinstance(stage, MergeStage) else stage.cluster.address
        if address not in (None, "auto"):
            raise UserError(
                f"cluster.address: is {address!r}, but a job always runs in the cluster to which it is submitted; "
                "remove the key"
            )


def _named_files(tree: Any, overrides: Sequence[str], *, folder: Path, beside: Path) -> set[Path]:
    """Return the files named by relative paths in the configuration, even if left out by .gitignore."""
    tree = apply_overrides(tree, overrides)
    models = {key for key, _ in model_places(tree.values)}
    for name, stage in (tree.values.get("stages") or {}).items():
        models |= {("stages", name, *key) for key, _ in model_places(stage)}
    files: set[Path] = set()
    for key, value in _texts(tree.values):
        place = f"{tree.place(key)}: {'.'.join(key)}"
        named = value.rpartition(":")[0] if ".py:" in value else value
        if key[0] == "run" or "\n" in named or os.path.isabs(named):
            continue
        if key in models:
            if named.startswith((".", "~")) or os.path.isdir(folder / named):
                raise UserError(
                    f"{place}: {value} is a folder on this machine, but models are not sent with a job. Name a model "
                    "of the hub, or an absolute path that every node can read."
                )
            continue
        if named.startswith("~"):
            raise UserError(f"{place}: {value} is in this machine's home folder; move it into the project, {folder}")
        is_code = named.endswith(".py")
        paths = [base / named for base in ((beside, folder) if is_code else (folder,))]
        if not is_code and "data" in key:
            paths.append(folder / named.partition(":")[0])  # a saved dataset and its split
        path = next((path for path in paths if os.path.isfile(path) or ("data" in key and os.path.isdir(path))), None)
        if path is None:
            matches = (
                glob.glob(named, root_dir=folder, recursive=True) if "data" in key and glob.has_magic(named) else []
            )
            for match in matches:
                files |= _below((folder / match).resolve(), folder, place)
            if not matches and (is_code or "data" in key) and named.endswith((".py", *FILE_SUFFIXES)):
                raise UserError(f"{place}: {named} does not exist; looked for {' and '.join(map(str, paths))}")
            continue
        files |= _below(path.resolve(), folder, place)
    return files


def _image_files(loaded: LoadedConfig, folder: Path) -> set[Path]:
    """Return the images that rows of the project's data name by relative paths, even if left out by .gitignore."""
    files: set[Path] = set()
    for name, stage in loaded.stages.items():
        if isinstance(stage, MergeStage):
            continue
        sets: dict[str, DataSource] = {}
        if isinstance(stage, Config):
            sets |= {key: mixed.source for key, mixed in train_sets(stage).items()}
            sets |= {f"data.eval.{key}": source for key, source in eval_sets(stage).items()}
        else:
            sets |= {f"evaluate.data.{key}": source for key, source in stage.evaluate.sets.items()}
        columns = stage.data.columns if isinstance(stage, Config) else stage.evaluate.columns
        for key, source in sets.items():
            if isinstance(source, str) and source.endswith(FILE_SUFFIXES) and not os.path.isabs(source):
                with prefix_errors(f"stages.{name}.{key}" if loaded.is_pipeline else key):
                    files |= _images_of(source, columns, folder)
    return files


def _images_of(source: str, columns: Mapping[str, str], folder: Path) -> set[Path]:
    """Return the images of a data file. UserError: a file is missing or outside, or all are too large."""
    files: set[Path] = set()
    for row in (row for shard in open_shards(source, columns=columns) for row in shard.read(0)):
        for written in image_files(row):
            if os.path.isabs(written):
                continue  # on a disk of the cluster
            path = Path(os.path.normpath(Path(row.file).absolute().parent / Path(written).expanduser()))
            is_inside = path.is_relative_to(folder) and path.resolve().is_relative_to(folder)
            if is_inside and path.is_file():
                files.add(path.relative_to(folder))
            elif has_images(row, strict=True):
                what = "does not exist" if is_inside else f"is outside of the project, {folder}"
                raise UserError(
                    f"{row.place}: the image {path} {what}, and a job gets only the files of {folder}. {_SHARED}"
                )
    size = sum((folder / name).stat().st_size for name in files) / 2**20
    if size > LARGEST_MIB:
        raise UserError(
            f"The rows of {source} name {len(files)} images of {size:.0f} MiB, but at most {LARGEST_MIB} MiB can be "
            f"sent with a job. {_SHARED}"
        )
    return files


def _below(path: Path, folder: Path, place: str) -> set[Path]:
    """Return a file, or all files of a folder, relative to the project's folder."""
    if not path.is_relative_to(folder):
        raise UserError(
            f"{place}: {path} is not below {folder}, and a job gets only the files of this folder; move the file there"
        )
    if path.is_file():
        return {path.relative_to(folder)}
    return _safe({file.relative_to(folder) for file in path.rglob("*") if file.is_file()}, folder)


def _safe(names: set[Path], folder: Path) -> set[Path]:
    """Leave out secrets and links to files outside of the project, and warn of each."""
    reasons = {name: reason for name in names if (reason := _why_unsafe(name, folder)) is not None}
    if reasons:
        listed = "".join(f"\n  {name}: {reasons[name]}" for name in sorted(reasons))
        logger.warning("these files are not sent with the job; the configuration names none of them:%s", listed)
    return names - reasons.keys()


def _why_unsafe(name: Path, folder: Path) -> str | None:
    """Return the reason why a listed file is left out, or None."""
    target = (folder / name).resolve()
    if not target.is_relative_to(folder):
        return f"a link to {target}, outside of the project"
    if str(name) == ENVIRONMENT:
        return "the variables of another job"
    for path in (name, target.relative_to(folder)):
        if SECRETS.fullmatch(path.name) or SECRET_FOLDERS.intersection(path.parts):
            return "it may hold secrets; `--env NAME` gives the job a single variable"
    return None


def _texts(value: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield every string of a tree with the string's key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping | list):
        below = value.items() if isinstance(value, Mapping) else (("", inner) for inner in value)
        for name, inner in below:
            yield from _texts(inner, (*key, str(name)) if isinstance(value, Mapping) else key)


def _listed(folder: Path) -> set[Path]:
    """Return the files outside .gitignore, committed or not, with or without a repository."""
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        output = _git(folder, *listing)
        if output is None:
            with tempfile.TemporaryDirectory() as empty:
                _git(folder, "init", "--quiet", "--bare", empty)
                output = _git(folder, f"--git-dir={empty}", f"--work-tree={folder}", *listing)
    except FileNotFoundError as error:
        raise UserError(
            "git is not installed, but `rlhf submit` needs git to find the files that .gitignore excludes. Install git."
        ) from error
    files: set[Path] = set()
    for name in filter(None, (output or "").split("\0")):
        path = folder / name
        if (path / ".git").exists() and not path.is_symlink():  # a separate repository: a submodule or a clone
            files |= {Path(name) / inner for inner in _listed(path)}
        elif path.is_file():
            files.add(Path(name))
    return files


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git. None: git refuses."""
    options: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True, "timeout": GIT_WITHIN_S}
    done = subprocess.run(["git", *arguments], **options, check=False)
    return done.stdout if done.returncode == 0 else None


def _refuse_too_large(folder: Path, files: Sequence[Path]) -> None:
    sizes = {name: (folder / name).stat().st_size / 2**20 for name in files}
    if sum(sizes.values()) > LARGEST_MIB:
        largest = ", ".join(f"{name} ({sizes[name]:.0f} MiB)" for name in sorted(sizes, key=lambda n: -sizes[n])[:3])
        raise UserError(
            f"{folder} has {sum(sizes.values()):.0f} MiB in {len(files)} files, but at most {LARGEST_MIB} MiB can be "
            f"sent with a job. The largest files are: {largest}. Exclude files in .gitignore, or put them into a "
            "folder that every node can read."
        )

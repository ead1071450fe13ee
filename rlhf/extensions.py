"""Locate and load code that extends a run: algorithms, rewards, environments and trackers.

A configuration names such code in four ways: as a built-in, as `path/file.py:NAME`, by the name of an installed
package's entry point, or as an object that the calling script passed (rlhf.passed_objects). This module uses only the
standard library, since reward processes start through this module.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal

from rlhf.errors import UserError

Kind = Literal["algorithm", "reward", "environment", "agent", "tracker", "loss"]

MAX_ERROR_CHARS = 500
# Frames of these files are not shown as the place of an error, because they only call the user's code.
_CALLERS = (__file__, os.path.join(os.path.dirname(__file__), "rewards", "processes", ""))

_PACKAGE = os.path.join(os.path.dirname(__file__), "")
_GUARD = 'Put this call below `if __name__ == "__main__":`.'
_FILE_MODULE = "rlhf_file_"  # prefix of the modules of imported files
PASSED = "python object "  # prefix of the names of passed objects

_imported: dict[str, tuple[bytes, ModuleType]] = {}  # the text of each imported file, and its module
_importing: set[str] = set()  # files whose import has begun
_hosts_code = False  # whether this process runs nothing but code that a configuration names


class LoadError(Exception):
    """Raised if code cannot be loaded; the message says why."""


class StartRefused(LoadError):
    """Raised if code named in a configuration starts work of the framework; the message has the file and the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedObject:
    """An object of the calling script or notebook, pickled by value. It travels only between processes of a run."""

    name: str  # in messages
    file: str  # of the code, for the place of an error; empty if unknown
    pickled: bytes = field(repr=False)
    digest: bytes  # of code and values, equal for each start of the same script


passed_objects: dict[str, PassedObject] = {}  # of the present call, by the name in the configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeSource:
    """Code named in a configuration. `args` go to a class's constructor, or are fixed for a function."""

    path: str | None  # absolute path of a file, or the file of a passed object; None for a built-in or an entry point
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    entry: str | None = None  # `package.module:NAME` of an entry point
    package: str | None = None  # name and version of the package that offers the entry point
    passed: PassedObject | None = None  # an object passed by the calling script

    def digest(self) -> bytes:
        """Return a digest of the arguments and of a file's text, without imported files, or a package's version, or the
        code and the values of a passed object."""
        if self.passed is not None:
            text = self.passed.digest
        else:
            text = b"" if self.path is None else Path(self.path).read_bytes()
        settings = repr((self.name, self.args, self.entry, self.package)).encode()
        return hashlib.blake2b(settings + text, digest_size=16).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns of a data row taken by a function, by name."""

    required: tuple[str, ...]  # parameters without a default
    optional: tuple[str, ...]  # parameters with a default
    takes_all: bool  # it has **columns

    def select(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a row for the function. KeyError if a required column is missing."""
        names = [*self.required, *(name for name in self.optional if name in columns)]
        return {name: columns[name] for name in (dict.fromkeys([*names, *columns]) if self.takes_all else names)}


def find_code(
    kind: Kind,
    name: str,
    *,
    built_ins: Collection[str] = (),
    args: Mapping[str, Any] | None = None,
    folders: Sequence[Path] = (),
    key: str = "",
) -> CodeSource:
    """Locate code without importing it. A file is relative to the first of `folders` with the file. UserError,
    beginning with the configuration's `key` if given: the name is unknown, ambiguous or a missing file."""
    if name.startswith(PASSED):
        return _find_passed(kind, name, args=dict(args or {}), key=key)
    key, args = f"{key}: " if key else "", dict(args or {})
    path, colon, target = name.rpartition(":")
    if colon:
        candidates = [str((folder / os.path.expanduser(path)).resolve()) for folder in folders]
        for candidate in filter(os.path.isfile, candidates):
            return CodeSource(path=candidate, name=target, args=args)
        tried = ", ".join(dict.fromkeys(candidates))
        raise UserError(f"{key}the file `{path}` of the {kind} does not exist (looked for {tried})")
    offers = _offers(kind, name, key)
    if name in built_ins:
        if offers:
            text = f"{key}the package {_package(offers[0])} offers the {kind} `{name}`, which is a built-in {kind}"
            raise UserError(f"{text}. Uninstall the package, or give its entry point another name.")
        return CodeSource(path=None, name=name, args=args)
    if offers:
        entry = f"{offers[0].module}:{offers[0].attr}"
        return CodeSource(path=None, name=name, args=args, entry=entry, package=_package(offers[0]))
    if name.endswith(".py"):
        raise UserError(f"{key}`{name}` names a file, but no {kind} in it. Write `{name}:NAME`.")
    raise UserError(f"{key}there is no {kind} `{name}`{_known_names(kind, name, built_ins)}")


def _find_passed(kind: Kind, name: str, *, args: Mapping[str, Any], key: str) -> CodeSource:
    if (passed := passed_objects.get(name)) is None:
        section = key or f"the {kind}"
        raise UserError(
            f"{section}: `{name}` stands for an object of the script that started the run, which no file can hold. "
            f'Start the run from Python, and pass the {kind} there: rlhf.train({{"base": FILE, ...}}), where {section} '
            "is the object."
        )
    return CodeSource(path=passed.file, name=passed.name, args=args, passed=passed)


def is_offered(kind: Kind, name: str) -> bool:
    """Return whether an installed package or the calling script offers the name, or the name is only a file."""
    return name.endswith(".py") or name.startswith(PASSED) or bool(entry_points(group=f"rlhf.{kind}s", name=name))


def _offers(kind: Kind, name: str, key: str) -> list[EntryPoint]:
    """Return the entry point of a name, if any. UserError if several packages offer the name."""
    offers = list(entry_points(group=f"rlhf.{kind}s", name=name))
    if len(offers) > 1:
        packages = " and ".join(sorted(map(_package, offers)))
        raise UserError(f"{key}the packages {packages} all offer the {kind} `{name}`. Uninstall all but one of them.")
    return offers


def _known_names(kind: Kind, name: str, built_ins: Collection[str]) -> str:
    installed = sorted(entry_points(group=f"rlhf.{kind}s").names - set(built_ins))
    near = difflib.get_close_matches(name, [*built_ins, *installed], n=1)
    hint = f"; did you mean `{near[0]}`?" if near else "."
    lists = (("Built-in", built_ins), ("From packages", installed))
    known = "".join(f" {title}: {', '.join(names)}." for title, names in lists if names)
    own = "" if kind == "tracker" else f" For your own {kind}, write `path/file.py:NAME`."
    return f"{hint}{known}{own}" if known or own else f"{hint} No installed package offers a {kind}."


def _package(offer: EntryPoint) -> str:
    return "of unknown name" if offer.dist is None else f"{offer.dist.name} {offer.dist.version}"


def load_code(source: CodeSource, *, isolated: bool = False) -> Any:
    """Import the file or the package, and return the named object, or raise LoadError. `isolated`: this process runs
    nothing but such code."""
    if source.passed is not None:
        return _restore(source.passed)
    if source.path is not None:
        offer, where, name, module = "", source.path, source.name, import_file(source.path, isolated=isolated)
    else:
        assert source.entry is not None, f"{source.name} is a built-in"
        where, _, name = source.entry.partition(":")
        offer = f"the package {source.package} offers `{source.name}` as {source.entry}, but "
        try:
            module = importlib.import_module(where)
        except StartRefused:
            raise
        except BaseException as error:  # sys.exit in a module is reported like an exception
            raise LoadError(f"{offer}importing {where} raised {summarize(error, None)}") from error
    members = vars(module)
    if name not in members:
        local = [n for n, v in members.items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise LoadError(f"{offer}{where} defines no `{name}`; it defines: {', '.join(local) or 'nothing callable'}")
    return members[name]


def restore_code(file: str, make: Callable[..., CodeType], args: tuple[Any, ...]) -> CodeType:
    """Return the code of a passed object with its file, which cloudpickle leaves out."""
    return make(*args).replace(co_filename=file)


def _restore(passed: PassedObject) -> Any:
    try:
        return pickle.loads(passed.pickled)
    except StartRefused:
        raise
    except ModuleNotFoundError as error:
        raise LoadError(
            f"`{passed.name}` uses the module {error.name}, which the processes of the run cannot import. Install the "
            "module on every node, put it beside the script on every node, or define what you need in the script."
        ) from error
    except BaseException as error:  # sys.exit in an imported module is reported like an exception
        raise LoadError(f"restoring `{passed.name}` raised {summarize(error, passed.file)}") from error


def import_file(path: str, *, isolated: bool = False) -> ModuleType:
    """Import a file as a module with a separate name, once for each text of the file. LoadError on failure.

    The file may import its neighbours. In a process that is not `isolated`, installed modules of the same name win.
    """
    text = Path(path).read_bytes()
    if path in _imported and _imported[path][0] == text:
        return _imported[path][1]
    if path in _importing:
        raise LoadError(f"{path} loads a configuration that names {path} itself. {_GUARD}")
    name = _FILE_MODULE + Path(path).stem  # prefixed, so a file `random.py` does not replace the module
    while name in sys.modules:
        name += "_"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if (folder := str(Path(path).parent)) not in sys.path[: 1 if isolated else None]:
        sys.path.insert(0 if isolated else len(sys.path), folder)
    _importing.add(path)
    try:
        exec(compile(text, path, "exec"), vars(module))  # not by the import spec: it may find older bytecode
    except StartRefused:
        del sys.modules[name]
        raise
    except BaseException as error:  # sys.exit in a file is reported like an exception
        del sys.modules[name]
        raise LoadError(f"importing {path} raised {summarize(error, path)}") from error
    finally:
        _importing.discard(path)
    _imported[path] = text, module
    return module


def host_code() -> None:
    """Declare that this process runs nothing but code named in a configuration. Such code may start no work."""
    global _hosts_code
    _hosts_code = True


def refuse_start(call: str) -> None:
    """Raise StartRefused for a call of the Python API from code named in a configuration, which the frames reveal."""
    frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(1))]
    is_imported = any(frame.f_code is load_code.__code__ for frame in frames)
    is_loaded = any(frame.f_globals.get("__name__", "").startswith(_FILE_MODULE) for frame in frames)
    if not (is_imported or is_loaded or _hosts_code):
        return
    outside = [frame for frame in frames if not frame.f_code.co_filename.startswith(("<", _PACKAGE))]
    place = f"{outside[0].f_code.co_filename}:{outside[0].f_lineno}: " if outside else ""
    if is_imported:
        raise StartRefused(
            f"{place}{call} is called while the file is imported. Each process that needs a function or a class of the "
            f"file imports the file, and would start the work again. {_GUARD}"
        )
    raise StartRefused(
        f"{place}{call} is called by code that a configuration names. A reward, an environment, an agent or an "
        "algorithm cannot start work of the framework. Make the call in a separate script."
    )


def construct(source: CodeSource, target: type) -> Any:
    """Return an instance of a class with the source's arguments. LoadError on failure."""
    try:
        inspect.signature(target).bind(**source.args)
    except TypeError as error:
        text = f"class `{source.name}` cannot be constructed with args {dict(source.args)}"
        raise LoadError(f"{text}: {error}") from error
    try:
        return target(**source.args)
    except BaseException as error:
        raise LoadError(f"constructing `{source.name}` raised {summarize(error, source.path)}") from error


def describe_frames(frames: Sequence[tuple[str, int, str]], path: str | None) -> str:
    """Format the last of the (file, line, function) frames, the innermost, and the last in the user's file."""
    shown = [frame for frame in frames if frame[0] == path or not frame[0].startswith(("<", *_CALLERS))]
    user_frames = [frame for frame in shown if frame[0] == path]
    places = dict.fromkeys([*shown[-1:], *user_frames[-1:]])
    return ", called from ".join(f"{shown_file(file)}:{line} in {function}" for file, line, function in places)


def shown_file(file: str) -> str:
    """Return the name of a code's file for a message: for a cell of a notebook `Cell In[5]`."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cell = None if shell is None else shell.compile.format_code_name(file)
    return file if cell is None else " ".join(cell)


def summarize(error: BaseException, path: str | None) -> str:
    """Return type, text and place of an exception on a single line."""
    text = " ".join(" ".join(traceback.format_exception_only(error)).split())[:MAX_ERROR_CHARS]
    frames = [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)]
    place = describe_frames(frames, path)
    return f"{text}, at {place}" if place else text

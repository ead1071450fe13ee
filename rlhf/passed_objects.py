"""Pass objects of a script or a notebook to a run: functions, classes and instances, pickled by value.

A configuration holds values only, so an object stands there under a name such as `python object close of __main__`. The
pickled object travels with the rewards and environments to the processes of the run. Code of the script is pickled by
value, so no process imports the script. Code of an importable module is pickled by reference.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import re
import sys
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any, get_type_hints

from rlhf.errors import UserError
from rlhf.extensions import PASSED, PassedObject, passed_objects, restore_code, shown_file

MAX_MIB = 256  # of a pickled object: each process of the run gets a copy
_RANDOM = re.compile(r"[0-9a-f]{32}|.*:\d{9,}")  # cloudpickle's id of a class, and pydantic's name of a schema

_calls: list[None] = []  # in progress: a notebook may make a call while another call trains in a thread


@contextmanager
def forgotten_afterwards() -> Generator[None]:
    """Forget all objects after the last block in progress. A file that names such an object is then refused."""
    _calls.append(None)
    try:
        yield
    finally:
        _calls.pop()
        if not _calls:
            passed_objects.clear()


def name_of_code(value: Any, place: str, names: dict[int, str]) -> str:
    """Return the name of a function, a class or an instance in a configuration, and remember the object.

    A function or a class at the top level of a file outside of packages is named FILE.py:NAME, so that a file can hold
    the configuration. `names` are the names in the same configuration by the object's id. UserError: the object cannot
    be pickled.
    """
    if (file := _in_file(value)) is not None:
        return file
    if id(value) not in names:
        is_code = inspect.isroutine(value) or inspect.isclass(value)
        short = (value if is_code else type(value)).__qualname__.rpartition("<locals>.")[2] + "()" * (not is_code)
        module = getattr(value if is_code else type(value), "__module__", None) or "builtins"
        number, name, passed = 1, f"{PASSED}{short} of {module}", _passed(value, short, place)
        while name in names.values() or passed_objects.get(name, passed).digest != passed.digest:
            number += 1
            name = f"{PASSED}{short} ({number}) of {module}"
        passed_objects[name], names[id(value)] = passed, name
    return names[id(value)]


def _in_file(value: Any) -> str | None:
    """Return FILE.py:NAME for a function or a class that a process finds there without this script."""
    if not (inspect.isfunction(value) or inspect.isclass(value)) or value.__module__ == "__main__":
        return None
    module, name = sys.modules.get(value.__module__), value.__qualname__
    file = getattr(module, "__file__", None) or ""
    is_there = file.endswith(".py") and vars(module).get(name) is value and not getattr(module, "__package__", "")
    return f"{file}:{name}" if is_there and Path(file).is_file() else None


def code_file(value: Any) -> str:
    """Return the file of the code of a function, a class or an instance, or an empty string if unknown."""
    while isinstance(value, functools.partial):
        value = value.func
    code = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    members = vars(code).values() if inspect.isclass(code) else [code]
    functions = (inspect.unwrap(member) for member in members if inspect.isfunction(member) or inspect.ismethod(member))
    return next((function.__code__.co_filename for function in functions), "")


def _passed(value: Any, name: str, place: str) -> PassedObject:
    try:
        _resolve_config(value)
        pickled, digest = _pickled(value), _digest(value)
    except Exception as error:  # a class may define how it is pickled, so any exception is possible
        text = " ".join(traceback.format_exception_only(error)[-1].split())
        raise UserError(
            f"{place}: `{name}` cannot be sent to the processes of the run, because {_culprit(value)} cannot be "
            f"pickled: {text}. Create such a value inside of the function, or in the constructor of a class and pass "
            "the class."
        ) from error
    if len(pickled) > MAX_MIB * 2**20:
        raise UserError(
            f"{place}: `{name}` takes {len(pickled) / 2**20:.0f} MiB when pickled, more than {MAX_MIB}. Each process "
            "of the run gets a copy. Read large data from a file in the constructor of a class, and pass the class."
        )
    return PassedObject(name=name, file=shown_file(code_file(value)), pickled=pickled, digest=digest)


def _resolve_config(value: Any) -> None:
    """Replace the text of an algorithm's annotation `config` by the class: no process has the script's module."""
    annotations = vars(value).get("__annotations__", {}) if inspect.isclass(value) else {}
    if isinstance(annotations.get("config"), str):
        annotations["config"] = get_type_hints(value)["config"]


def _pickled(value: Any) -> bytes:
    """Pickle by value as cloudpickle does, but with the file of each code for the place of an error."""
    import cloudpickle  # only imported by scripts that pass objects

    reduce = cloudpickle.Pickler.dispatch_table[CodeType]

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table = cloudpickle.Pickler.dispatch_table.new_child(
            {CodeType: lambda code: (restore_code, (shown_file(code.co_filename), *reduce(code)))}
        )

    stream = io.BytesIO()
    Pickler(stream).dump(value)
    return stream.getvalue()


def _culprit(value: Any) -> str:
    """Name the part of an object that cannot be pickled: an attribute, a variable around a function, or a global."""
    for name, part in _parts(value):
        try:
            _pickled(part)
        except Exception:  # noqa: BLE001  any exception marks the part
            return f"{name} of type {type(part).__name__}"
    return f"the {type(value).__name__}"


def _parts(value: Any, owner: str = "the function") -> Iterator[tuple[str, Any]]:
    """Yield the parts that are pickled with an object, by name."""
    if inspect.isfunction(value):
        variables = inspect.getclosurevars(value)
        yield from ((f"the variable `{name}` around {owner}", inner) for name, inner in variables.nonlocals.items())
        yield from ((f"the global variable `{name}`", inner) for name, inner in variables.globals.items())
        yield from ((f"a default of {owner}", inner) for inner in value.__defaults__ or ())
        return
    for name, inner in vars(value).items() if hasattr(value, "__dict__") else ():
        if inspect.isclass(value) and inspect.isfunction(inner):
            yield from _parts(inner, f"the method `{name}`")
        else:
            yield f"the attribute `{name}`", inner
    if not inspect.isclass(value):
        yield from _parts(type(value))


def _digest(value: Any) -> bytes:
    """Return a digest of code and values, without file names, line numbers, and all that differs between processes."""
    import cloudpickle

    script = getattr(sys.modules["__main__"], "__file__", None)

    class Normalized(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, inner: Any) -> Any:
            if isinstance(inner, CodeType):
                return inner.co_code, inner.co_consts, inner.co_names, inner.co_varnames, inner.co_freevars
            if isinstance(inner, set | frozenset):
                return sorted(map(repr, inner))
            return "" if isinstance(inner, str) and (inner == script or _RANDOM.fullmatch(inner)) else None

    stream = io.BytesIO()
    Normalized(stream).dump(value)
    return hashlib.blake2b(stream.getvalue(), digest_size=16).digest()

"""Read the commands of a shell script without running the script.

Variables, arrays, here-documents, `${NAME:-default}` and integer arithmetic are expanded. A variable without a value in
the script, such as `$1` or the output of a command, stays as `${NAME}`.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

_QUOTED = r"\"[^\"]*\"|'[^']*'|\$\(\(.*?\)\)"
_PART = re.compile(
    r"^[ \t]*read\b[^\n]*?(?P<heredoc>\w+)[ \t]*<<-?[ \t]*['\"]?(?P<end>\w+)['\"]?\n"
    r"(?P<text>.*?)\n[ \t]*(?P=end)[ \t]*$"
    r"|^[ \t]*(?:export |declare -a )?(?P<array>\w+)(?P<more>\+?)=\((?P<items>.*?)\)[ \t]*$"
    rf"|^[ \t]*(?:export |local )?(?P<name>[A-Za-z_]\w*)=(?P<value>(?:{_QUOTED}|[^\s;&|#\"'])*)[ \t]*(?:#[^\n]*)?;?$"
    r"|^(?P<line>[^\n]+)$",
    re.MULTILINE | re.DOTALL,
)
_VARIABLE = re.compile(r"\$\{(\w+|[@*#])(?:\[[@*]\])?(?:(:?)[-=]([^{}]*)|,,|\^\^)?\}|\$(\w+|[@*#])")
_WHOLE_ARRAY = re.compile(r'"(\$\{\w+\[@\]\})"')  # the items are words of their own
_ARITHMETIC = re.compile(r"\$\(\(([\w\s+*/%()-]*)\)\)")
_OUTPUT = re.compile(r"\$\([^()]*\)")
_KEPT = "\0"  # stands for the `$` of a variable without a value
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command, expanded. A command ends before `|`, `&`, `;` and redirections."""
    variables = {"HOME": str(Path.home()), "@": "", "*": ""}
    for part in _PART.finditer(re.sub(r"\\\r?\n", "", text)):
        if name := part["heredoc"] or part["array"]:
            body = re.sub(r"(^|\s)#[^\n]*", r"\1", part["text"] or part["items"])
            before = variables.get(name, "") if part["more"] else ""
            variables[name] = f"{before} {_expand(body, variables)}"
        elif part["name"] and re.search(r"\$\((?!\()", part["value"]):
            variables.pop(part["name"], None)  # the output of a command
        elif part["name"]:
            variables[part["name"]] = " ".join(_words(_expand(part["value"], variables)))
        elif part["line"].strip():
            for command in _split(_words(_expand(part["line"], variables))):
                yield command
                if "-c" in command[:-1]:  # bash -c 'COMMANDS'
                    yield from commands(command[command.index("-c") + 1])


def _expand(text: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[4], match[3]
        if name not in variables or (match[2] and not variables[name]):  # `:-` also replaces an empty value
            return f"{_KEPT}{{{name}}}" if default is None else default
        return variables[name]

    for _ in range(20):  # from the inside out
        before, text = text, _VARIABLE.sub(value, _WHOLE_ARRAY.sub(r"\1", text))
        text = _OUTPUT.sub("", _ARITHMETIC.sub(lambda match: _number(match[1], variables), text))
        if text == before:
            break
    return text.replace(_KEPT, "$")


def _number(text: str, variables: dict[str, str]) -> str:
    def of(node: ast.expr) -> int:
        if isinstance(node, ast.Name):
            return int(variables[node.id])
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](of(node.left), of(node.right))
        return int(ast.literal_eval(node))

    try:
        return str(of(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError):
        return text.strip()


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        return list(lexer)
    except ValueError:  # an open quote
        return line.split()


def _split(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in words:
        if word and not set(word) - set("|&;<>"):
            if word[0] in "<>" and command and command[-1] in "012":
                command.pop()
            if command:
                yield command
            command = []
        else:
            command.append(word)
    if command:
        yield command

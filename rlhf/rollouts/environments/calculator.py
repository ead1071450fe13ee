"""A calculator as a tool, for questions with a number as the answer.

The policy may call the calculator as often as the turns allow. The first turn without a call is the answer.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
_MAX_DIGITS = 300
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator:
    """Offers the tool `calculate`.

    The reward is 1 if the last number of the answer equals the column `answer`. `tool_bonus` is a reward for a
    conversation with a successful calculation, also if the answer is wrong.
    """

    tools = (
        {
            "type": "function",
            "function": {
                "name": "calculate",
                "description": "The value of an arithmetic expression.",
                "parameters": {
                    "type": "object",
                    "properties": {"expression": {"type": "string", "description": "such as 3 * (4 + 5)"}},
                    "required": ["expression"],
                },
            },
        },
    )

    def __init__(self, tool_bonus: float = 0.0) -> None:
        self.tool_bonus = tool_bonus

    def reset(self, seed: int, answer: object) -> None:
        """Store the expected answer. The prompt already asks the question. ValueError: the answer has no number."""
        number = _number(str(answer))
        if number is None:
            raise ValueError(f"the column `answer` is {answer!r:.80}, expected a number in digits, such as 7")
        self.answer = number
        self.bonus = self.tool_bonus

    def step(self, response: str, tool_calls: Sequence[Mapping[str, Any]]) -> tuple[str | list[str], float, bool]:
        """Calculate the calls of a turn, or judge the answer."""
        if not tool_calls:
            number = _number(response)
            right = number is not None and math.isclose(number, self.answer, rel_tol=1e-6)
            return "", float(right), True
        results, reward = [], 0.0
        for call in tool_calls:
            try:
                results.append(_shown(evaluate_expression(call["arguments"]["expression"])))
            except (ValueError, ArithmeticError) as error:
                results.append(f"error: {error}")
            else:
                reward, self.bonus = reward + self.bonus, 0.0
        return results, reward, False


def evaluate_expression(expression: str) -> int | float:
    """Return the value of numbers joined by + - * / // % and brackets.

    ValueError or ArithmeticError describes an invalid expression.
    """
    try:
        tree = ast.parse(expression[:1000].strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression[:80]!r} is no arithmetic expression") from error
    return _value(tree.body)


def _value(node: ast.expr) -> int | float:
    value: int | float
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("only numbers, + - * / // % and brackets can be calculated")
    if abs(value) >= 10**_MAX_DIGITS:
        raise ValueError(f"the value has more than {_MAX_DIGITS} digits")
    return value


def _number(text: str) -> float | None:
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return float(numbers[-1].replace(",", "")[:_MAX_DIGITS]) if numbers else None


def _shown(value: int | float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)

"""The text between two turns is the template's; built-in environments and their rows work; wrong calls are answered."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.data.tasks import Split, TaskSource, make_rows
from rlhf.errors import UserError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.rollouts.environments.calculator import Calculator, evaluate_expression
from rlhf.rollouts.environments.guess_number import GuessNumber
from rlhf.rollouts.environments.tool_calls import ToolCall, read_calls
from rlhf.rollouts.environments.turns import ChatTurns, first_prompt, turn_text
from rlhf.types import Prompt

EOS = 257
CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m.role + '\n' + m.content + '<|eos|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)


def tokenizer(template: str | None = None) -> Any:
    made = byte_tokenizer()
    if template is not None:
        made.chat_template = template
    return made


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]


def test_a_turn_that_ended_is_followed_by_the_next_ones_beginning() -> None:
    writer = ChatTurns(tokenizer(CHATML), with_tools=True, ends=(262,))
    assert writer.stop_token == EOS
    told = "\n<|user|>user\nhigher<|eos|>\n<|user|>assistant\n"
    assert list(writer.after([52, EOS], "higher")) == ids(told)
    assert list(writer.after([52, 262], "higher")) == ids(told)  # another end of the model
    assert list(writer.after([52, 53], "higher")) == [EOS, *ids(told)]  # a cut turn: its end was not sampled
    results = "\n<|user|>tool\n1<|eos|>\n<|user|>tool\n2<|eos|>\n<|user|>assistant\n"
    assert list(writer.after([EOS], ("1", "2"))) == ids(results)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHATML.replace("+ '<|eos|>' + '\n'", "+ '\n'"), "not with a special token"),
        (CHATML.replace("m.content", "m.content[:3]"), "does not write an assistant's turn exactly once"),
        (CHATML.replace("m.content", "m.content + m.content"), "does not write an assistant's turn exactly once"),
        (CHATML.replace("m.content", "('' if loop.last and m.role == 'user' else m.content)"), "of role user"),
        ("{{ raise_exception('no') }}", "refuses the roles user, assistant"),
    ],
)
def test_a_template_that_cannot_be_continued_is_refused(template: str, why: str) -> None:
    with pytest.raises(UserError, match=r"^rollouts\.environment: .*" + why):
        ChatTurns(tokenizer(template), with_tools=False)


def test_a_template_without_tools_is_refused_for_tools_alone() -> None:
    made = tokenizer("{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CHATML)
    ChatTurns(made, with_tools=False)
    with pytest.raises(UserError, match="no tools"):
        ChatTurns(made, with_tools=True)
    made.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        ChatTurns(made, with_tools=False)


def test_the_first_observation_has_one_place_and_a_turn_as_text_is_without_its_end() -> None:
    def prompt(text: str) -> Prompt:
        return Prompt(prompt_id=0, token_ids=tuple(ids(text)), text=text, columns={})

    assert list(first_prompt(prompt("<|user|>{observation}!<|eos|>"), "hi", tokenizer())) == ids("<|user|>hi!<|eos|>")
    assert list(first_prompt(prompt("go"), "", tokenizer())) == ids("go")
    with pytest.raises(ValueError, match=r"the prompt has no \{observation\}"):
        first_prompt(prompt("go"), "hi", tokenizer())
    with pytest.raises(ValueError, match="reset returned no observation"):
        first_prompt(prompt("{observation}"), "", tokenizer())
    said = [*b"ab", EOS]
    assert turn_text(said, tokenizer(), stop_token=EOS, skip_special_tokens=False) == "ab"
    assert turn_text(said[:2], tokenizer(), stop_token=EOS, skip_special_tokens=False) == "ab"


def test_a_guess_is_answered_until_it_is_right_and_a_secret_is_its_seeds() -> None:
    game = GuessNumber(low=1, high=10)
    game.reset(seed=3, secret=7)
    assert game.step("4") == ("higher", 0.0, False)
    assert game.step("not 4 but 9") == ("lower", 0.0, False)
    assert game.step("11") == ("a number from 1 to 10", 0.0, False)
    assert game.step("none") == ("a number from 1 to 10", 0.0, False)
    assert game.step("7") == ("right", 1.0, True)
    secrets = []
    for seed in (1, 1, 2, 3, 4):
        game.reset(seed=seed)
        secrets.append(game.secret)
    assert secrets[0] == secrets[1]
    assert len(set(secrets)) > 1
    with pytest.raises(ValueError, match="must be below high"):
        GuessNumber(low=3, high=3)


def test_a_calculator_calculates_and_judges() -> None:
    tool = Calculator(tool_bonus=0.25)
    tool.reset(seed=0, answer="1,776")
    call = {"name": "calculate", "arguments": {"expression": "37 * 48"}}
    assert tool.step("", [call, call]) == (["1776", "1776"], 0.25, False)  # the bonus is given once
    wrong = {"name": "calculate", "arguments": {"expression": "1 / 0"}}
    assert tool.step("", [wrong])[0] == ["error: division by zero"]
    assert tool.step("It is 1776.", []) == ("", 1.0, True)
    assert tool.step("It is 1775.", []) == ("", 0.0, True)
    assert tool.step("no number", []) == ("", 0.0, True)
    tool.reset(seed=0, answer="\N{MINUS SIGN}7")
    assert [tool.step(response, [])[1] for response in ("-7", "\N{MINUS SIGN}7.", "7")] == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="`answer` is 'seven', expected a number"):
        tool.reset(seed=0, answer="seven")


NO_ARITHMETIC = ("__import__('os')", "2 ** 9999999", "a + 1", "'a' * 9", "[1]", "1 +", "(" * 500, "True + 1", "9" * 400)


def test_expressions() -> None:
    for expression, value in {"3 * (4 + 5)": 27, "-7 // 2": -4, "2.5 / 5": 0.5, "10 % 4 - 1": 1}.items():
        assert evaluate_expression(expression) == value
    for expression in (*NO_ARITHMETIC, "1e999"):
        with pytest.raises((ValueError, ArithmeticError)):
            evaluate_expression(expression)


def test_games_to_learn_from_follow_the_rules() -> None:
    rows = make_rows(TaskSource(task="guessing_game", split="sft", size=70, args={"low": 1, "high": 7}))
    assert {row["secret"] for row in rows} == set(range(1, 8))
    for row in rows:
        game = GuessNumber(low=1, high=7)
        game.reset(seed=0, secret=row["secret"])
        turns = row["messages"]
        told = [game.step(turn["content"]) for turn in turns if turn["role"] == "assistant"]
        assert [observation for observation, _, _ in told[:-1]] == [turn["content"] for turn in turns[2::2]]
        assert told[-1] == ("right", 1.0, True)


def test_calculations_to_learn_from_are_right_and_splits_are_drawn_apart() -> None:
    for row in make_rows(TaskSource(task="calculator", split="sft", size=20)):
        question, _, result, answer = row["messages"][1:]
        expression = question["content"].removeprefix("What is ").removesuffix("?")
        assert str(evaluate_expression(expression)) == result["content"] == answer["content"] == row["answer"]
    splits: tuple[Split, ...] = ("sft", "train", "eval")
    drawn = [make_rows(TaskSource(task="calculator", split=s, size=900, args={"max_value": 9})) for s in splits]
    questions = [{row["messages"][1]["content"] for row in rows} for rows in drawn]
    assert len(set.union(*questions)) == sum(map(len, questions))


PROPERTIES = {"a": {"type": "integer"}, "b": {"type": "number"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}]


def call(arguments: str, name: str = "add") -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def test_calls_that_fit_are_handed_on() -> None:
    read = read_calls((call('{"a": 1, "b": 2.5}'), call('{"a": 2}')), TOOLS)
    assert read == ([{"name": "add", "arguments": {"a": 1, "b": 2.5}}, {"name": "add", "arguments": {"a": 2}}], ())
    assert read_calls((), TOOLS) == ([], ())
    anything = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": True}}}}
    assert read_calls((call('{"a": [1]}'),), [anything]) == ([{"name": "add", "arguments": {"a": [1]}}], ())


@pytest.mark.parametrize(
    ("made", "answer"),
    [
        (None, "could not be read"),
        ((call("{}"),), "add lacks the argument a"),
        ((call('{"a": 1, "c": 2}'),), "add has no argument c"),
        ((call('{"a": "1"}'),), "the argument a of add must be of type integer"),
        ((call('{"a": true}'),), "must be of type integer"),
        ((call('"1"'),), "the arguments of add are no object"),
        ((call('{"a": '),), "the arguments of add are no object"),
        ((call("{}", name="sub"),), "there is no tool 'sub'; there is add"),
    ],
)
def test_what_does_not_fit_is_told(made: tuple[ToolCall, ...] | None, answer: str) -> None:
    calls, problems = read_calls(made, TOOLS)
    assert calls == []
    assert answer in problems[0]
    calls, (first, *_) = read_calls((call('{"a": 1}'), *(made or ()), call("{}")), TOOLS)
    assert calls == []
    assert "not called" in first  # one wrong call prevents all other calls

"""Conversations with real environment processes and a scripted policy: limits, seeds, tools, failures, no leftovers."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from transformers import AutoTokenizer

from rlhf.controller.rollout_scorer import request_for
from rlhf.data.images import RowImages
from rlhf.data.prompts import load_prompts
from rlhf.errors import ChildLost, UserError
from rlhf.extensions import CodeSource
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.rollouts.environments import host as module
from rlhf.rollouts.environments.conversations import Conversations, EnvironmentSpec, turn_seed
from rlhf.rollouts.environments.host import EnvironmentHost
from rlhf.rollouts.environments.tool_calls import ToolCall
from rlhf.rollouts.environments.tool_servers import ToolServer
from rlhf.rollouts.records.spans import InsertedSpan, Played, Sampled
from rlhf.types import FinishReason, GroupRequest, Prompt, Sampling
from rlhf.vision.keys import image_keys
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageCollector, ImageLimits
from rlhf.vision.store import ImageStore
from tests.fixtures.rows import as_rows, reading

T = TypeVar("T")
MOODY = Path(__file__).parents[1] / "fixtures" / "environments" / "moody.py"
EOS, UNTIL_ANSWER = 257, CodeSource(path=None, name="until_answer")


def spec(**changes: Any) -> EnvironmentSpec:
    source = CodeSource(path=None, name="guess_number", args={"low": 1, "high": 9})
    limits = {"max_turns": 4, "max_tokens": 100, "step_timeout_s": 5.0, "memory_gib": 2.0, "processes": 8}
    how = {"source": source, "tool_parser": "hermes", "tokenizer": "", "trust_remote_code": False}
    return EnvironmentSpec(**{**limits, **how, **changes})  # type: ignore[arg-type]


def moody(**args: Any) -> CodeSource:
    return CodeSource(path=str(MOODY), name="Moody", args=args)


def request(samples: int = 1, text: str = "?", **columns: Any) -> GroupRequest:
    ids = tuple(byte_tokenizer()(text, add_special_tokens=False).input_ids)
    prompt = Prompt(prompt_id=3, token_ids=ids, text=text, columns=columns, is_chat=text.startswith("<|user|>"))
    return request_for(prompt, group_id=0, first_sequence_id=0, samples=samples, run_seed=0)


class Script:
    """A policy with scripted answers, independent of the input. Requests are remembered."""

    def __init__(self, *says: str) -> None:
        self.says = says
        self.asked: list[tuple[tuple[int, ...], int, int]] = []

    async def __call__(
        self, group_id: int, tokens: tuple[int, ...], seed: int, sampling: Sampling, stop: int | None
    ) -> Sampled:
        said = (*self.says[len(self.asked) % len(self.says)].encode(), EOS)[: sampling.max_new_tokens]
        self.asked.append((tokens, seed, sampling.max_new_tokens))
        logprobs, versions = (-1.0,) * len(said), (0,) * len(said)
        end: FinishReason = "stop" if said[-1] == EOS else "length"
        return Sampled(token_ids=said, logprobs=logprobs, versions=versions, finish_reason=end)


class Calls:
    """Reads `!NAME ARGUMENTS` as a call, and `|` between calls; `!` alone is malformed."""

    def parse(self, text: str) -> tuple[ToolCall, ...] | None:
        parts = [part[1:].partition(" ") for part in text.split("|")] if text.startswith("!") else []
        calls = tuple(ToolCall(name=name, arguments=arguments) for name, _, arguments in parts)
        return calls if all(call.arguments for call in calls) else None


def play(asked: GroupRequest, draw: Any, used: EnvironmentSpec | None = None, *, tokens: int = 8) -> list[Played]:
    async def run() -> list[Played]:
        conversations = Conversations(used or spec(), byte_tokenizer(), draw)
        description = await conversations.start()
        conversations.parser = Calls() if description.tools else None
        try:
            return await conversations.play(asked, Sampling(max_new_tokens=tokens))
        finally:
            await conversations.stop()

    return asyncio.run(asyncio.wait_for(run(), 60.0))


def said(played: Played) -> list[str]:
    return [byte_tokenizer().decode(span.token_ids) for span in played.spans]


def test_turns_alternate_until_the_environment_is_done() -> None:
    script = Script("3", "9", "7")
    (played,) = play(request(secret=7), script)
    assert said(played) == ["3<|eos|>", "higher", "9<|eos|>", "lower", "7<|eos|>"]
    assert [isinstance(span, Sampled) for span in played.spans] == [True, False, True, False, True]
    assert (played.rewards, played.finish_reason, played.error) == ((0.0, 0.0, 1.0), "stop", None)
    seed = request().seeds[0]
    assert [one[1] for one in script.asked] == [seed, turn_seed(seed, 1), turn_seed(seed, 2)]
    assert script.asked[1][0] == (*b"?3", EOS, *b"higher")  # each turn is sampled after the whole earlier conversation


def test_a_demonstration_has_the_tokens_of_the_conversation_it_shows() -> None:
    turns = [("assistant", "3"), ("user", "higher"), ("assistant", "9"), ("user", "lower"), ("assistant", "7")]
    row = {"prompt": "?", "secret": 7, "completion": [{"role": role, "content": text} for role, text in turns]}
    (prompt,) = load_prompts(
        as_rows(row), byte_tokenizer(), reading(apply_chat_template=True, max_given_tokens=90)
    ).items
    (played,) = play(request(text=prompt.text, secret=7), Script("3", "9", "7"))
    spans = [(prompt.token_ids, False), *((span.token_ids, isinstance(span, Sampled)) for span in played.spans)]
    assert prompt.given is not None
    assert prompt.given.token_ids == tuple(token for ids, _ in spans for token in ids)
    assert prompt.given.loss_mask == tuple(sampled for ids, sampled in spans for _ in ids)


def test_turns_after_equal_observations_have_equal_anchors() -> None:
    (first,) = play(request(secret=7), Script("3", "9", "7"))  # sees nothing, higher, lower
    (second,) = play(request(secret=7), Script("9", "3", "4", "8"))  # nothing, lower, higher, higher; then the limit
    nothing, higher, lower = first.anchors
    assert len({nothing, higher, lower}) == 3
    assert second.anchors == (nothing, lower, higher, higher)
    assert len(second.anchors) == len(second.rewards or ())


def test_a_limit_of_turns_or_tokens_cuts_without_a_reward_for_the_end() -> None:
    """Prompt 1, turn 2, observation 6: 9 tokens. Of 13 the next turn may have 4, and ends before 6 more."""
    (played,) = play(request(secret=7), Script("1"), spec(max_turns=2))
    assert said(played) == ["1<|eos|>", "higher", "1<|eos|>"]
    assert (played.rewards, played.finish_reason) == ((0.0, 0.0), "length")
    script = Script("1", "1 is my guess")
    (played,) = play(request(secret=7), script, spec(max_tokens=13))
    assert [one[2] for one in script.asked] == [8, 4]
    assert said(played) == ["1<|eos|>", "higher", "1 is"]
    assert played.finish_reason == "length"


def test_a_cut_turn_goes_on_in_a_chat_behind_an_end_that_was_not_sampled() -> None:
    (played,) = play(request(text="<|user|>go<|eos|><|assistant|>", secret=7), Script("111111111", "7"))
    assert said(played) == ["11111111", "<|eos|><|user|>a number from 1 to 9<|eos|><|assistant|>", "7<|eos|>"]
    assert isinstance(played.spans[1], InsertedSpan)
    assert played.finish_reason == "stop"


def test_a_group_plays_one_game_and_a_slow_environment_stalls_itself_alone() -> None:
    """Of two simultaneous groups, the group with an answering environment finishes first."""
    through: list[str] = []

    async def play_both() -> None:
        conversations = Conversations(spec(source=moody(rounds=2)), byte_tokenizer(), Script("x"))
        await conversations.start()

        async def one(name: str, sleep_s: float) -> None:
            asked = request(samples=2, text="{observation}", sleep_s=sleep_s)
            played = await conversations.play(asked, Sampling(max_new_tokens=8))
            assert [(sum(group.rewards or ()), group.finish_reason) for group in played] == [(1.0, "stop")] * 2
            assert {bytes(group.prompt_token_ids) for group in played} == {f"game {request().seeds[0]}".encode()}
            through.append(name)

        try:
            await asyncio.gather(one("slow", 1.5), one("quick", 0.0))
        finally:
            await conversations.stop()

    asyncio.run(asyncio.wait_for(play_both(), 60.0))
    assert through == ["quick", "slow"]


@pytest.mark.parametrize(
    ("mood", "kind", "message"),
    [
        ("raise", "raised", "step: ValueError: out of order, at "),
        ("hang", "timeout", "step did not answer within rollouts.environment.step_timeout_s: 1, at "),
        ("exit", "died", "in step, it exited with code 3"),
        ("crash", "died", "in step, it was killed by SIGSEGV, at "),
        ("greedy", "died", "ran out of memory (rollouts.environment.memory_gib: 2)"),
        ("nan", "not_a_number", "step returned nan as reward"),
        ("array", "raised", "step returned the observation <"),
        ("bad_start", "raised", "reset: ValueError: no game today"),
        ("half", "raised", "reset: UnicodeEncodeError"),
        ("unlike", "raised", "may depend only on the seed and the columns"),
        ("long", "raised", "which leaves no room for a response"),
    ],
)
def test_a_failure_is_that_conversations_error(mood: str, kind: str, message: str) -> None:
    asked = request(samples=1 + (mood == "unlike"), text="{observation}" + "x" * 50 * (mood == "long"), mood=mood)
    played = play(asked, Script("x"), spec(source=moody(), step_timeout_s=1.0, max_tokens=40))
    error, rewards = next((one.error, one.rewards) for one in played if one.error is not None)
    assert (error.kind, error.prompt_id, rewards) == (kind, 3, None)
    assert message in error.message


def test_tools_are_called_and_wrong_calls_are_told() -> None:
    script = Script("!", "!multiply {}", '!calculate {"expression": "6*7"}', "42")
    used = spec(source=CodeSource(path=None, name="calculator", args={}), max_tokens=400)
    (played,) = play(request(answer="42"), script, used, tokens=60)
    wrong = ["error: the tool call could not be read", "error: there is no tool 'multiply'; there is calculate"]
    assert said(played)[1::2] == [*wrong, "42"]
    assert (played.rewards, played.finish_reason) == ((0.0, 0.0, 0.0, 1.0), "stop")


def in_host(source: CodeSource, work: Callable[[EnvironmentHost], Awaitable[T]], *, step_timeout_s: float = 5.0) -> T:
    async def run() -> T:
        host = EnvironmentHost(source, step_timeout_s=step_timeout_s, memory_gib=2.0)
        try:
            await host.start()
            return await work(host)
        finally:
            await host.stop()

    return asyncio.run(asyncio.wait_for(run(), 60.0))


async def described(host: EnvironmentHost) -> None:
    assert host.description is not None


def gone(pid: int) -> bool:
    """Return whether a process has ended, or ends within a minute."""
    deadline = time.monotonic() + 60.0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


QUICK = Path(__file__).parents[1] / "fixtures" / "tools" / "quick_server.py"


def quick_server(*words: str, timeout_s: float = 20.0) -> ToolServer:
    key, command = "rollouts.environment.tools.mcp.0", (sys.executable, str(QUICK), *words)
    limits: dict[str, Any] = {"timeout_s": timeout_s, "only": None, "max_result_chars": 80}
    return ToolServer(key=key, command=command, url=None, env={}, headers={}, **limits)


def test_tools_of_a_server_are_called_in_a_process_of_the_conversation() -> None:
    """Each of two conversations has a separate server with a separate memory."""
    script = Script("!echo {}", '!echo {"text": "a"}', '!echo {"text": "b"}', "done")
    used = spec(source=UNTIL_ANSWER, max_tokens=600, servers=(quick_server(),), processes=1)
    played = play(request(samples=2), script, used, tokens=60)
    pids = set()
    for one in played:
        assert one.error is None
        wrong, first, second = said(one)[1::2]
        assert wrong == "error: echo lacks the argument text"
        pid, _, text = first.partition(" ")
        assert (text, second) == ("a", f"{pid} a b")
        assert (one.rewards, one.finish_reason) == ((0.0,) * 4, "stop")
        pids.add(int(pid))
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_server_that_fails_is_that_conversations_error() -> None:
    used = spec(source=UNTIL_ANSWER, servers=(quick_server(timeout_s=2.0),))
    script = Script('!die {"text": ""}')
    (played,) = play(request(), script, used, tokens=60)
    assert played.error is not None
    assert played.error.kind == "unavailable"
    assert "failed to answer a call of the tool die: Connection closed" in played.error.message


def test_a_killed_conversation_leaves_no_server() -> None:
    """The hanging process is killed, and cannot end the server itself."""
    script = Script('!echo {"text": "a"}', "x")
    used = spec(source=moody(), step_timeout_s=2.0, servers=(quick_server("--loud"),), max_turns=8, max_tokens=600)
    asked = request(text="{observation}", mood="hang")
    (played,) = play(asked, script, used, tokens=60)
    assert played.error is not None
    assert played.error.kind == "timeout"
    pids = re.findall(r"(\d+) a", byte_tokenizer().decode(script.asked[-1][0]))
    assert pids
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)


def test_the_limit_of_a_call_is_the_servers() -> None:
    """The call takes longer than a step of the environment may."""
    used = spec(source=UNTIL_ANSWER, servers=(quick_server(),), step_timeout_s=1.0, max_turns=1, max_tokens=400)
    script = Script('!wait {"text": "1.5"}')
    (played,) = play(request(), script, used, tokens=60)
    assert (played.error, played.rewards) == (None, (0.0,))


def test_an_environment_may_have_tools_besides_those_of_servers() -> None:
    calculator = CodeSource(path=None, name="calculator", args={})
    script = Script('!echo {"text": "a"}|!calculate {"expression": "6*7"}|!echo {"text": "b"}', "42")
    used = spec(source=calculator, max_tokens=600, servers=(quick_server(),))
    (played,) = play(request(answer="42"), script, used, tokens=120)
    assert played.error is None
    first, result, second = said(played)[1].splitlines()
    assert (first.split()[1:], result, second.split()[1:]) == (["a"], "42", ["a", "b"])
    assert played.rewards == (0.0, 1.0)
    with pytest.raises(UserError, match=r"mcp.0: .* has the tool `calculate`, as the environment has. Name the tools"):
        play(request(answer="42"), script, spec(source=calculator, servers=(quick_server("calculate"),)))


def test_a_conversation_ends_with_all_that_it_started() -> None:
    async def work(host: EnvironmentHost) -> tuple[int, list[int]]:
        conversation = await host.open()
        await conversation.reset(1, {"mood": "parent"})
        for _ in range(2):
            await conversation.step("x")
        children = [child.pid for child in psutil.Process(conversation.pid).children()]
        await conversation.end()
        return conversation.pid, children

    pid, children = in_host(moody(), work)
    assert children
    assert all(gone(one) for one in (pid, *children))


def test_nothing_outlives_the_process_that_plays() -> None:
    """The process is killed like an engine on a machine out of memory."""
    program = (
        "import asyncio\n"
        "from rlhf.extensions import CodeSource\n"
        "from rlhf.rollouts.environments.host import EnvironmentHost\n"
        "async def run():\n"
        f"    source = CodeSource(path={str(MOODY)!r}, name='Moody', args={{}})\n"
        "    host = EnvironmentHost(source, step_timeout_s=5, memory_gib=2)\n"
        "    await host.start()\n"
        "    conversation = await host.open()\n"
        "    await conversation.reset(1, {'mood': 'parent'})\n"
        "    [await conversation.step('x') for _ in range(2)]\n"
        "    print('up', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(run())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as player:
        assert player.stdout is not None
        assert player.stdout.readline() == "up\n"
        children = [child.pid for child in psutil.Process(player.pid).children(recursive=True)]
        player.kill()
    assert len(children) == 4  # the environment, its parent, its copy, and the copy's child
    assert all(gone(pid) for pid in children)


def test_one_that_is_cancelled_leaves_no_process() -> None:
    async def work(host: EnvironmentHost) -> None:
        opening = asyncio.ensure_future(host.open())
        await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait([opening])
        other = await host.open()  # the host matches each answer to its call
        await other.reset(1, {})
        await other.end()
        zygote = psutil.Process(host.pid)
        async with asyncio.timeout(30.0):
            while zygote.children():
                await asyncio.sleep(0.02)

    in_host(moody(), work)


def test_the_loss_of_the_environments_own_process_is_said() -> None:
    async def work(host: EnvironmentHost) -> int:
        conversation = await host.open()
        psutil.Process(host.pid).kill()
        for call in (host.open(), conversation.reset(1, {})):  # the conversation has not failed by itself
            with pytest.raises(ChildLost, match="environment's process is gone") as lost:
                await call
            assert lost.value.kind == "died"
        return conversation.pid

    assert gone(in_host(moody(), work))


def test_an_environments_own_process_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(host: EnvironmentHost) -> None:
        conversation = await host.open()
        psutil.Process(host.pid).suspend()
        monkeypatch.setattr(module, "FORK_TIMEOUT_S", 0.1)
        with pytest.raises(ChildLost, match=r"did not fork within 0\.1 s") as lost:
            await host.open()
        assert lost.value.kind == "hung"
        monkeypatch.setattr(module, "FORK_TIMEOUT_S", 600.0)
        monkeypatch.setattr(module, "STOP_WITHIN_S", 3.0)
        for call in (host.open(), conversation.end()):
            with pytest.raises(ChildLost):
                await call

    in_host(moody(), work)


RESET, STEP = "    def reset(self, seed): ...\n", "    def step(self, response): ...\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"class E:\n{STEP}", "has no method `reset`"),
        (f"class E:\n    def reset(self): ...\n{STEP}", "must take `seed`"),
        (f"class E:\n{RESET}    def step(self): ...", "must take `response`"),
        (f"class E:\n    async def reset(self, seed): ...\n{STEP}", "is async"),
        (f"class E:\n    tools = [3]\n{RESET}{STEP}", "expected {"),
        (f"class E:\n{RESET}    def step(self, response, tool_calls): ...", "takes `tool_calls` if, and only if"),
        ("class E:\n    def __init__(self, size): ...", "missing a required argument: 'size'"),
        ("def E(): ...", "an environment is a class"),
        ("x = 1 / 0", "raised ZeroDivisionError"),
        ("F = 1", "defines no `E`"),
        ("import os; os._exit(4)", "ended its process"),
    ],
)
def test_what_is_no_environment_is_said_before_a_run(tmp_path: Path, code: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(UserError) as error:
        in_host(CodeSource(path=str(path), name="E", args={}), described)
    assert message in str(error.value)


@pytest.mark.parametrize(("killed", "is_replaced"), [(1, True), (2, False)])
def test_a_process_killed_while_it_loads_is_replaced_once(
    killed: int, is_replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []

    class Killed(module.ChildProcess):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            pids.append(self.process.pid)
            if len(pids) <= killed:
                self.process.kill()

    monkeypatch.setattr(module, "ChildProcess", Killed)
    if is_replaced:
        in_host(moody(), described)
    else:
        with pytest.raises(UserError, match="ended its process"):
            in_host(moody(), described)
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_fingerprint_is_that_of_the_code_and_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("a")
    used = spec(source=CodeSource(path=str(path), name="E", args={}))
    first = used.fingerprint()
    assert replace(used, max_turns=9).fingerprint() != first
    assert replace(used, processes=1).fingerprint() == first
    path.write_text("b")
    assert used.fingerprint() != first


# Images

LOOK = """
from PIL import Image

class Look:
    def reset(self, seed):
        return [{"type": "text", "text": "red:"}, {"type": "image", "image": Image.new("RGB", (48, 32), "red")}]

    def step(self, response):
        if response == "wrong":
            return [{"type": "image", "image": "/etc/hostname"}], 0.0, False
        if response == "typed":
            return "<|image_pad|>", 0.0, False
        return [{"type": "image", "image": Image.new("RGB", (48, 32), "blue")}], 1.0, response == "end"
"""


def look(tmp_path: Path, says: Sequence[str], images: RowImages | None) -> tuple[Played, Any]:
    (tmp_path / "look.py").write_text(LOOK)
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_vision(tmp_path / "model", "qwen3_vl", seed=0))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "{observation}"}], tokenize=False, add_generation_prompt=True
    )
    prompt = Prompt(prompt_id=3, token_ids=(1,), text=text, columns={}, is_chat=True)
    asked = request_for(prompt, group_id=0, first_sequence_id=0, samples=1, run_seed=0)

    async def run() -> Played:
        used = spec(source=CodeSource(path=str(tmp_path / "look.py"), name="Look"))
        conversations = Conversations(used, tokenizer, Script(*says), images=images)
        await conversations.start()
        try:
            (played,) = await conversations.play(asked, Sampling(max_new_tokens=8))
            return played
        finally:
            await conversations.stop()

    return asyncio.run(asyncio.wait_for(run(), 60.0)), tokenizer


def test_images_of_an_environment_stand_in_the_tokens_of_the_conversation(tmp_path: Path) -> None:
    build_tiny_vision(tmp_path / "model", "qwen3_vl", seed=0)
    processing = ImageProcessing.of_model(str(tmp_path / "model"))
    assert processing is not None
    store = ImageStore(tmp_path / "images")
    played, tokenizer = look(tmp_path, ("go", "end"), RowImages(processing, ImageCollector(store, ImageLimits())))
    assert played.error is None
    (red,), (blue,) = image_keys(played.prompt_token_ids), image_keys(played.spans[1].token_ids)
    assert store.image(red).getpixel((0, 0)) == (255, 0, 0)
    assert store.image(blue).getpixel((0, 0)) == (0, 0, 255)
    shown = "<|vision_start|>" + 6 * "<|image_pad|>" + "<|vision_end|>"
    ids = processing.plain_ids(played.prompt_token_ids)
    assert tokenizer.decode(ids) == f"<|user|>red:{shown}<|eos|><|assistant|>"
    ids = processing.plain_ids(played.spans[1].token_ids)
    assert tokenizer.decode(ids) == f"<|user|>{shown}<|eos|><|assistant|>"
    assert len(set(played.anchors)) == 2

    for says, why in (("wrong", "observation has the part"), ("typed", "has 1 placeholders")):
        failed, _ = look(tmp_path, (says,), RowImages(processing, ImageCollector(store, ImageLimits())))
        assert failed.error is not None
        assert why in failed.error.message


def test_a_conversation_has_at_most_the_images_of_the_configuration(tmp_path: Path) -> None:
    build_tiny_vision(tmp_path / "model", "qwen3_vl", seed=0)
    processing = ImageProcessing.of_model(str(tmp_path / "model"))
    assert processing is not None
    for most, says, why in (
        (2, ("go", "on", "end"), "the conversation has 3 images, more than data.max_images, 2. Raise data.max_images"),
        (3, ("go", "on", "end"), None),  # the image behind the last turn is not shown
    ):
        reader = ImageCollector(ImageStore(tmp_path / "images"), ImageLimits(max_images=most))
        played, _ = look(tmp_path, says, RowImages(processing, reader))
        assert why in played.error.message if why else played.error is None


def test_a_model_without_a_tower_gets_no_images(tmp_path: Path) -> None:
    played, _ = look(tmp_path, ("go",), None)
    assert played.error is not None
    assert "the model reads only text" in played.error.message

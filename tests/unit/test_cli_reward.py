"""`rlhf reward` and `rlhf serve-reward` score responses as a run does, and refuse wrong input."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

import rlhf
from rlhf.cli import main
from rlhf.config.files.load import load
from rlhf.errors import UserError
from rlhf.preflight.inputs import load_inputs
from rlhf.process.owned_folders import temporary_folder
from rlhf.rewards.services.images import sent_columns
from rlhf.scoring.http import MAX_BODY_BYTES, RewardServer
from rlhf.scoring.scorer import Scorer, Scoring, scoring_of_config, scoring_of_function
from rlhf.serving import serving_token
from rlhf.vision.store import ImageStore
from tests.vision_models import drawn, encoded

CONFIG = """\
run: {name: demo, dir: DIR}
policy: {model: "tiny:llama", dtype: float32}
algorithm: {name: grpo}
data: {train: DIR/data.jsonl, eval: DIR/data.jsonl}
rollouts: {prompts_per_step: 2, samples_per_prompt: 2, max_new_tokens: 8}
rewards:
  correct: {function: exact_match}
  length: {function: "DIR/mine.py:length", weight: 0.5, gate: correct, truncated_score: -1.0}
train: {steps: 1, lr: 1e-3, sequences_per_update: 2, max_tokens_per_microbatch: 8192}
"""
CODE = """\
def length(prompt, response):
    if response == "boom":
        raise ValueError("too loud")
    return len(response)
"""


SEEN = """\
from PIL import Image

def seen(prompt, response, images):
    return float(sum(Image.open(path).getpixel((10, 10))[0] for path in images))  # the red of the square
"""
FOUND = "def found(prompt, response, result):\n    return float(result['found'])\n"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE)
    write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": "xx"}, {"prompt": "b", "answer": "y"}])
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("DIR", str(tmp_path)))
    return str(path)


def row(prompt: str, response: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "answer": "xx", **columns}


def test_a_file_is_scored_as_a_run_would(config: str, tmp_path: Path) -> None:
    rows = [row("a", "xx"), row("b", "xx"), row("a", "xxx"), row("b", "xx", truncated=True)]
    found = rlhf.reward(config, write(tmp_path / "r.jsonl", rows)).rows
    # right: 1 + .5 * 2 * 1 = 2; wrong: 0 + .5 * 3 * 0; cut and right: 1 + .5 * -1 * 1
    assert [one.score for one in found] == [2.0, 2.0, 0.0, 0.5]
    assert [one.group for one in found] == [0, 1, 0, 1]
    assert found[2].scores == {"correct": 0.0, "length": 3.0}
    assert found[2].place == f"{tmp_path}/r.jsonl:3"


def test_samples_of_a_run_get_the_columns_of_its_data(config: str, tmp_path: Path) -> None:
    tokens = {"texts": ["x", "x"], "sampled": [True, False], "old_logprobs": [-0.5, None], "ref_logprobs": None}
    sample = {"group_id": 3, "response_tokens": 2, "score": 0.0, "tokens": tokens}
    rows = [
        {"split": "train", "prompt_id": 1, "prompt": "<b>", "response": "y", **sample},
        {"split": "heldout", "prompt_id": 0, "prompt": "<a>", "response": "xx", **sample},
    ]
    assert [one.score for one in rlhf.reward(config, write(tmp_path / "r.jsonl", rows)).rows] == [1.5, 2.0]
    wrong_rows = {"train has 2 rows in": {"prompt_id": 2}, "evaluation sets of .* are heldout": {"split": "other"}}
    for why, wrong in wrong_rows.items():
        with pytest.raises(UserError, match=rf"r.jsonl:1: .*{why}"):
            rlhf.reward(config, write(tmp_path / "r.jsonl", [rows[0] | wrong]))


def test_rewards_get_the_images_of_samples_and_rows_as_files(config: str, tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(encoded(drawn(colour)))
    write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": "xx", "images": ["red.png", "red.png"]}])
    (tmp_path / "mine.py").write_text(SEEN)
    tokens = {"texts": ["x"], "sampled": [True], "old_logprobs": [-0.5], "ref_logprobs": None}
    sample = {"split": "train", "prompt_id": 0, "prompt": "<a>", "response": "xx"}
    sample |= {"group_id": 3, "response_tokens": 1, "score": 0.0, "tokens": tokens}
    sample["images"] = ["0123456789abcde"]  # of the run's folder, with the images of turns
    of_file = {"prompt": "<image>?", "response": "x", "images": ["blue.png"]}
    how = [f"rewards={{seen: {{function: '{tmp_path}/mine.py:seen'}}}}", "policy.model=tiny:qwen3_vl"]
    exchanged = sample | {"split": "heldout.exchanged"}  # of an evaluation with `exchange_images`
    file = write(tmp_path / "r.jsonl", [sample, of_file, exchanged])
    found = rlhf.reward(config, file, how).rows
    assert [one.score for one in found] == [255.0 * 2, 0.0, 255.0 * 2]
    assert [one.group for one in found] == [0, 1, 2]
    with pytest.raises(UserError, match=r"r\.jsonl:1: has images, and the reward model of taste gets only the text"):
        rlhf.reward(config, file, [how[1], "rewards={taste: {role: reward}}", "reward.model=tiny:llama"])
    with pytest.raises(UserError, match=r"r\.jsonl:1: image 1 of column `images`: .*gone\.png cannot be read"):
        rlhf.reward(config, write(tmp_path / "r.jsonl", [of_file | {"images": ["gone.png"]}]), how)
    with pytest.raises(UserError, match=r"r\.jsonl:1: holds an image, and the model reads only text"):
        rlhf.reward(config, write(tmp_path / "r.jsonl", [of_file]), how[:1])


def test_samples_of_an_agent_are_scored_with_its_results(config: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FOUND)
    of_run = {"split": "train", "prompt_id": 1, "group_id": 3, "response_tokens": 2, "prompt": "<b>", "response": "y"}
    rows = [{**of_run, "columns": {"answer": "x…"}, "shortened": {}, "result": {"found": n}} for n in (1, 0)]
    rewards = f"rewards={{found: {{function: '{tmp_path}/mine.py:found'}}}}"
    file = write(tmp_path / "r.jsonl", rows)
    assert [one.score for one in rlhf.reward(config, file, [rewards]).rows] == [1.0, 0.0]
    for changed in ({"shortened": {"result": 9999}}, {"masked": ["result"]}):
        with pytest.raises(UserError, match="result"):
            rlhf.reward(config, write(tmp_path / "r.jsonl", [rows[0], rows[1] | changed]), [rewards])


def test_samples_get_the_columns_of_their_rows_although_the_run_skipped_others(config: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "xx"}, {"prompt": "b" * 99, "answer": "no"}, {"prompt": "c", "answer": "xxx"}]
    write(tmp_path / "data.jsonl", rows)
    skips = ["data.max_prompt_tokens=9", "data.too_long=skip", "data.max_unusable_fraction=0.5"]
    sets = f"data.train={{one: {{source: {tmp_path}/data.jsonl}}, two: {{source: {tmp_path}/data.jsonl}}}}"
    (stage,) = load_inputs(load(config, [*skips, sets]))
    read = {"train": stage.inputs.prompts, "heldout": stage.inputs.eval_sets["heldout"].prompts}
    samples: list[dict[str, Any]] = [
        {"split": split, "prompt_id": p.prompt_id, "prompt": p.text, "response": p.columns["answer"]}
        for split, prompts in read.items()
        for p in prompts
    ]
    samples = [sample | {"response_tokens": 2} for sample in samples]
    found = rlhf.reward(config, write(tmp_path / "r.jsonl", samples), [*skips, sets]).rows
    assert [one.scores["correct"] for one in found] == [1.0] * 6


def test_failures_have_lines_and_end_by_policy(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "r.jsonl", [row("a", "xx"), row("b", "xx"), row("b", "boom")])
    assert main(["reward", config, "--file", file]) == 1
    out, err = capsys.readouterr()
    assert "1 raised" in out
    assert f"{file}:3: length: raised: ValueError: too loud" in err
    assert "2 of 3 rows have no score, and on_error of a failed reward is fail" in err
    assert main(["reward", config, "--file", file, "--json", "reward_policy.on_error=drop"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["score"] for line in lines] == [2.0, None, None]
    assert [[one["kind"] for one in line["errors"]] for line in lines] == [[], [], ["raised"]]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"prompt": "a"}, {"prompt": 3, "response": "x"}], r"r.jsonl:1: .*`response`(.|\n)*r.jsonl:2: .*`prompt`"),
        ([row("a", "b", truncated="no")], "`truncated` is the string 'no', expected a boolean"),
        ([{"prompt": "a", "response": "b"}], "rewards.correct.function: `exact_match` needs the column `answer`"),
    ],
)
def test_rows_that_cannot_be_scored(config: str, tmp_path: Path, rows: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        rlhf.reward(config, write(tmp_path / "r.jsonl", rows))
    assert str(refused.value).startswith(f"{config}:7: ") == ("rewards.correct" in why)  # with the reward's line


def test_the_page_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    chapter = page.partition("### A file with bad rows\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", chapter, flags=re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "yaml", "json", "console", "json", "console"]
    files = ("right.py", "run.yaml", "responses.jsonl", None, "broken.jsonl", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "7 * 8 =", "answer": "56"}\n')
    codes = []
    for (_, text), file in zip(blocks, files, strict=True):
        if file is not None:
            (tmp_path / file).write_text(text)
            continue
        command, _, printed = text.partition("\n")
        codes.append(main(shlex.split(command)[2:]))
        assert "".join(capsys.readouterr()).replace(f"{tmp_path}/", "/w/") == printed
    assert codes == [1, 2]


def reward_model(tiny_model: Path, folder: Path) -> tuple[list[str], Callable[[list[int]], float]]:
    """Return the overrides of a run with a new reward model, and the model's score of token ids."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.save_pretrained(folder / "rm")
    overrides = [f"reward.model={folder}/rm", "reward.dtype=float32", "rewards={taste: {role: reward}}"]
    return overrides, lambda ids: model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


def test_a_reward_model_scores_the_text(config: str, tmp_path: Path, tiny_model: Path, tokenizer: Any) -> None:
    how, score = reward_model(tiny_model, tmp_path)
    tokenizer.save_pretrained(tmp_path / "rm")
    file = write(tmp_path / "r.jsonl", [row("a b", "cd"), row("a b", "c", truncated=True)])
    found = rlhf.reward(config, file, how).rows
    for one, text, end in zip(found, ("a bcd", "a bc"), ([tokenizer.eos_token_id], []), strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids + end
        assert one.score == pytest.approx(score(ids), rel=1e-5)
    file = write(tmp_path / "r.jsonl", [row("a b", "xcd"), row("a b", "xc", truncated=True)])
    whole, cut = rlhf.reward(config, file, how).rows
    steps = "reward.steps={combine: product, separator: c}"  # `xc` and `d`
    (one, other) = rlhf.reward(config, file, [*how, steps]).rows
    first, last = (1 / (1 + math.exp(-score)) for score in (cut.score, whole.score))
    assert [one.score, other.score] == pytest.approx([first * last, first], rel=1e-5)
    credited = ["rewards={taste: {role: reward, credit: step}}", "reward.steps={separator: c}"]
    (one, other) = rlhf.reward(config, file, [*how[:2], *credited]).rows
    assert [one.score, other.score] == pytest.approx([first + last, first], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "columns", "end"),
    [
        ([], {}, "<|reserved_0|>"),
        (["data.apply_chat_template=false"], {}, "<|eos|>"),
        (["data.apply_chat_template=false"], {"messages": []}, "<|reserved_0|>"),
    ],
)
def test_a_reward_model_scores_the_end_of_a_response(
    config: str, tmp_path: Path, tiny_model: Path, tokenizer: Any, overrides: list[str], columns: Any, end: str
) -> None:
    how, score = reward_model(tiny_model, tmp_path)
    turns = "{% for message in messages %}<|user|>{{ message.content }}<|reserved_0|>{% endfor %}"
    (tmp_path / "turns.jinja").write_text(turns)
    file = write(tmp_path / "r.jsonl", [row("<|user|>a", "b", **columns)])
    (found,) = rlhf.reward(config, file, [*how, f"data.chat_template={tmp_path}/turns.jinja", *overrides]).rows
    ids = tokenizer(f"<|user|>ab{end}", add_special_tokens=False).input_ids
    assert found.score == pytest.approx(score(ids), rel=1e-5)


@asynccontextmanager
async def served(scoring: Scoring, token: str | None = None) -> AsyncIterator[TestClient]:
    with temporary_folder() as images, Scorer(scoring) as scorer:
        server = RewardServer(scorer, scoring, token, images)
        async with TestClient(TestServer(server.application())) as client:
            yield client
        assert not list(images.iterdir())  # images are removed after the request


async def test_the_server(config: str) -> None:
    async with served(scoring_of_config(load(config)), "s3cret-token") as client:
        assert (await client.get("/health")).status == 200
        assert (await client.post("/score", json={})).status == 401
        client.session.headers["Authorization"] = "Bearer s3cret-token"

        async def ask(body: Any) -> tuple[int, Any]:
            answer = await client.post("/score", json=body)
            return answer.status, await answer.json()

        good = {"prompt": "p", "responses": ["xx", "x"], "columns": {"answer": "xx"}, "truncated": [True, False]}
        told = {"scores": [0.5, 0.0], "rewards": {"correct": [1.0, 0.0], "length": [-1.0, 1.0]}}
        assert await ask(good) == (200, told)
        (error,) = (await ask(good | {"responses": ["xx", "boom"]}))[1]["errors"]
        assert (error["sample"], error["kind"]) == (1, "raised")
        assert error["message"].startswith("length: ValueError: too loud")
        deep = json.loads("[" * 900 + "]" * 900)
        for key, values in {
            "columns": ({}, {"answer": deep}),
            "responses": ([], [1, 2]),
            "truncated": ([True],),
            "results": ([1], [1, deep]),
            "prompt": (None,),
            "extra": (1,),
        }.items():
            for value in values:
                assert (await ask(good | {key: value}))[0] == 400, (key, value)
        assert (await client.post("/score", data=b"{")).status == 400
        assert (await client.post("/score", data=b" " * (MAX_BODY_BYTES + 1))).status == 413
        assert (await client.get("/else")).status == 404


async def test_a_served_function_gets_images_as_files(config: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SEEN)
    function = f"{tmp_path}/mine.py:seen"
    red, blue = (encoded(drawn(colour)) for colour in ("red", "blue"))
    store = ImageStore(tmp_path / "images")
    columns = sent_columns({"images": [str(store.path(store.add(image))) for image in (red, blue, red)]})
    assert columns["images"][1] == f"data:image/png;base64,{base64.b64encode(blue).decode()}"
    assert sent_columns({"images": ["cat.png"]}) == {"images": ["cat.png"]}  # an ordinary column
    body = {"prompt": "p", "responses": ["a"], "columns": columns}
    seeing = load(config, [f"rewards={{seen: {{function: '{function}'}}}}", "policy.model=tiny:qwen3_vl"])
    for scoring in (scoring_of_function(function), scoring_of_config(seeing)):
        async with served(scoring) as client:
            answer = await client.post("/score", json=body)
            assert await answer.json() == {"scores": [255.0 * 2], "rewards": {"seen": [255.0 * 2]}}
            for images, why in {
                ("data:image/png;base64,AAAA",): r"columns\.images\[0\]: .*no image",
                (*columns["images"][:1], "/etc/passwd"): r"columns\.images\[1\]: '/etc/passwd' is a path",
                (*columns["images"][:1], "https://example.com/a.png"): r"columns\.images\[1\]: .*example\.com",
                tuple(columns["images"] * 3): "a list of at most 8 data URIs",
            }.items():
                answer = await client.post("/score", json=body | {"columns": {"images": list(images)}})
                assert answer.status == 400
                assert re.search(why, (await answer.json())["error"]), await answer.json()
    async with served(scoring_of_config(seeing)) as client:
        answer = await client.post("/score", json=body | {"columns": {"images": [str(tmp_path / "red.png")]}})
        assert answer.status == 400  # no path reaches the rewards of a model that sees


async def test_a_served_function_gets_the_result_of_an_agent(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FOUND)
    async with served(scoring_of_function(f"{tmp_path / 'mine.py'}:found")) as client:
        body = {"prompt": "p", "responses": ["a", "b"]}
        assert (await client.post("/score", json=body)).status == 400
        answer = await client.post("/score", json={**body, "results": [{"found": 1}, {"found": 0}]})
        assert (await answer.json())["scores"] == [1.0, 0.0]
        # without a token, the server accepts only its own name as host
        assert (await client.get("/health", headers={"Host": "elsewhere.org:8700"})).status == 403


def test_others_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serving_token("127.0.0.1", None) is None
    with pytest.raises(UserError, match="--token-env NAME"):
        serving_token("0.0.0.0", None)
    with pytest.raises(UserError, match="REWARD_TOKEN is not set"):
        serving_token("127.0.0.1", "REWARD_TOKEN")
    monkeypatch.setenv("REWARD_TOKEN", "t")
    assert serving_token("0.0.0.0", "REWARD_TOKEN") == "t"


def test_it_serves_until_it_is_told_to_end() -> None:
    words = [sys.executable, "-m", "rlhf.cli", "serve-reward", "last_number", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().removeprefix("serving ").strip()
            body = {"prompt": "", "responses": ["is 3", "is 4"], "columns": {"answer": "4"}}
            with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=30) as answer:
                assert json.load(answer)["scores"] == [0.0, 1.0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["serve-reward", "no_such"], "there is no reward `no_such`"),
        (
            ["serve-reward", "last_number", "run.seed=1"],
            "sets a key of a configuration, but last_number is neither a YAML",
        ),
        (["reward", "CONFIG", "--file", "missing.jsonl"], "missing.jsonl does not exist"),
    ],
)
def test_bad_arguments(words: list[str], why: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config if word == "CONFIG" else word for word in words]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("command", ["reward CONFIG --file ROWS", "serve-reward CONFIG", "plan CONFIG", "eval CONFIG"])
def test_a_reward_that_cannot_be_loaded_is_named_by_its_line(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = Path(config)
    path.write_text(path.read_text().replace("mine.py:length", "mine.py:width"))
    file = write(tmp_path / "r.jsonl", [row("a", "xx")])
    words = [{"CONFIG": config, "ROWS": file}.get(word, word) for word in command.split()]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{config}:8: rewards.length.function: " in error
    assert "defines no `width`" in error

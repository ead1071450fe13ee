"""The viewer reads growing, shortened and damaged files of run folders, and refuses forbidden requests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.tracking.run_folder.samples import SampleRecord, samples_path, write_samples
from rlhf.viewing import samples as viewing_samples
from rlhf.viewing import tail
from rlhf.viewing.runs import RunPlaces
from rlhf.viewing.samples import SampleFiles
from rlhf.viewing.server import RunViewer
from rlhf.viewing.tail import read_chunk
from tests.fakes.samples import sample_record, sample_tokens

HOSTILE = '</script><script>x()</script>\u202e\x00 , "tokens": {"texts": "'


def sample(number: int, response: str = "4", **fields: Any) -> SampleRecord:
    tokens = sample_tokens(response, "", sampled=(True, False), rollout_logprobs=(-0.5, None))
    base = {"sample": number, "prompt": f"2+2= {HOSTILE}", "response_tokens": 1, "tokens": tokens}
    return sample_record(response, score=float(number), **base | fields)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": null}\n')
    write_samples(samples_path(folder, 2), [sample(0), sample(1, HOSTILE)])
    return folder


Client = Callable[..., Awaitable[TestClient[Any, Any]]]


@pytest.fixture
async def client() -> Any:
    """Makes a client of a viewer of folders."""
    made = []

    async def make(*folders: Path, token: str | None = None) -> TestClient[Any, Any]:
        one = TestClient(TestServer(RunViewer(RunPlaces(folders), token).application()))
        await one.start_server()
        made.append(one)
        return one

    yield make
    for one in made:
        await one.close()


async def read(client: TestClient[Any, Any], place: dict[str, Any], *, run: str = "demo") -> tuple[list[int], Any]:
    response = await client.get("/api/metrics", params={"run": run, "from": place["next"], "mark": place["mark"]})
    assert response.status == 200
    steps = [json.loads(line)["step"] for line in (await response.text()).splitlines()]
    return steps, json.loads(response.headers["X-Place"])


START = {"next": 0, "mark": 0}


async def test_metrics_go_on_where_they_stopped(client: Client, run: Path) -> None:
    asked = await client(run)
    steps, place = await read(asked, START)
    assert (steps, place["reset"]) == ([1, 2], False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n{"step": 4, "a"')
    steps, place = await read(asked, place)
    assert (steps, place["reset"], place["more"]) == ([3], False, True)  # half a line is no line
    assert (await read(asked, place))[0] == []


@pytest.mark.parametrize("again", [0, 300])
async def test_a_run_that_takes_rows_back_is_read_anew(client: Client, run: Path, again: int) -> None:
    """The file is shorter than before, or has grown to the old length again."""
    asked = await client(run)
    _, place = await read(asked, START)
    text = "".join(json.dumps({"step": step, "again": True}) + "\n" for step in [1, *range(2, 2 + again)])
    (run / "metrics.jsonl").write_text(text)
    steps, place = await read(asked, place)
    assert place["reset"]
    assert steps == [1, *range(2, 2 + again)]
    (run / "metrics.jsonl").unlink()
    steps, place = await read(asked, place)
    assert (steps, place["reset"], place["next"]) == ([], True, 0)


async def test_a_summary_follows_the_rows_of_a_resumed_run(client: Client, run: Path) -> None:
    async def memory() -> tuple[int, list[list[str]]]:
        summary = await (await asked.get("/api/summary", params={"run": "demo"})).json()
        return summary["step"], [row for table in summary["tables"] for row in table["rows"]]

    asked = await client(run)
    assert await memory() == (2, [])
    with (run / "metrics.jsonl").open("a") as file:
        for step, used in ((3, 4.0), (4, 9.0), (5, 5.0)):
            file.write(json.dumps({"step": step, "memory/policy_rss_gib": used}) + "\n")
        file.write("damaged\n")
    assert await memory() == (5, [["memory/policy_rss_gib", "4", "5", "9"]])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))  # resumed after step 3
    assert await memory() == (3, [["memory/policy_rss_gib", "4", "4", "4"]])


def test_long_files_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is longer than a part; of errors only the end is read."""
    monkeypatch.setattr(tail, "CHUNK_BYTES", 64)
    path = tmp_path / "f"
    lines = [b'"%d"\n' % number for number in range(100)] + [b'"' + b"x" * 200 + b'"\n', b'"end"\n']
    path.write_bytes(b"".join(lines))
    found, start, mark = b"", 0, 0
    while True:
        piece = read_chunk(path, start, mark)
        assert not piece.reset
        found, start, mark = found + piece.lines, piece.next, piece.mark
        if not piece.more:
            break
    assert found == b"".join(lines)
    assert read_chunk(path, 0, 0, last=True).lines == b'"end"\n'


async def test_samples_are_listed_in_short_and_read_whole_by_place(client: Client, run: Path) -> None:
    asked = await client(run)
    listing = await (await asked.get("/api/samples", params={"run": "demo", "step": 2})).json()
    assert [(row["group"], row["sample"], row["score"], row["tokens"]) for row in listing["rows"]] == [
        ("train:3", 0, 0.0, 1),
        ("train:3", 1, 1.0, 1),
    ]
    assert listing["prompts"]["train:3"]["preview"] == f"2+2= {HOSTILE}"
    assert listing["bad_lines"] == 0
    params = {"run": "demo", "step": 2, "version": listing["version"], "at": "1"}
    response = await asked.get("/api/responses", params=params)
    whole = json.loads(await response.text())
    assert (whole["response"], whole["tokens"]["texts"]) == (HOSTILE, [HOSTILE, ""])
    assert response.content_type == "application/jsonl"
    write_samples(samples_path(run, 2), [sample(0, split="heldout")])
    assert (await asked.get("/api/responses", params=params)).status == 409
    listing = await (await asked.get("/api/samples", params={"run": "demo", "step": 2})).json()
    assert len(listing["rows"]) == 3


async def test_previews_leave_out_what_all_prompts_begin_with(client: Client, run: Path) -> None:
    system = "You are a helpful assistant who answers in one word. " * 8
    prompts = [f"{system}What is the capital of {country}?" for country in ("France", "Finland")]
    lines = [{"prompt_id": i, "sample": 0, "prompt": prompt, "response": ""} for i, prompt in enumerate(prompts)]
    samples_path(run, 5).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    asked = await client(run)
    listing = await (await asked.get("/api/samples", params={"run": "demo", "step": 5})).json()
    assert [one["preview"] for one in listing["prompts"].values()] == ["…France?", "…Finland?"]
    assert len({one["hash"] for one in listing["prompts"].values()}) == 2


def previews(run: Path, *rows: tuple[str, dict[str, Any]]) -> list[tuple[str, str]]:
    lines = [
        {"prompt_id": i, "sample": 0, "prompt": prompt, "response": "", "columns": columns}
        for i, (prompt, columns) in enumerate(rows)
    ]
    samples_path(run, 5).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    prompts = viewing_samples.SampleFiles().index(samples_path(run, 5)).prompts
    return [(one.preview, one.row) for one in prompts.values()]


def test_previews_of_equal_prompts_name_the_columns_that_differ(run: Path) -> None:
    guess = f"{'<system> You are helpful. ' * 20}Guess a colour: red, blue or green."
    rows = [(guess, {"secret": name, "of": 3}) for name in ("red", "blue")]
    assert previews(run, *rows) == [
        (f"…{guess[-159:].partition(' ')[2]}", f"secret: {name}") for name in ("red", "blue")
    ]
    assert previews(run, ("short one", {})) == [("short one", "")]


def test_previews_of_prompts_of_two_kinds_begin_where_they_differ(run: Path) -> None:
    story = "Tell a story of at least a hundred words, for children, about "
    rows = [("Add 2 and 3", {}), (f"{story}a cat", {}), (f"{story}a dog", {}), (f"{story}the sea", {})]
    assert [text for text, _ in previews(run, *rows)] == ["Add 2 and 3", "…cat", "…dog", "…the sea"]


async def test_a_line_that_is_nested_too_deep_is_a_bad_line(client: Client, run: Path) -> None:
    samples_path(run, 5).write_text('{"prompt": "p", "scores": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    asked = await client(run)
    listing = await (await asked.get("/api/samples", params={"run": "demo", "step": 5})).json()
    assert (listing["rows"], listing["bad_lines"]) == ([], 1)


async def test_damaged_and_other_lines_of_samples(client: Client, run: Path) -> None:
    """Samples of `rlhf eval` have a set and no tokens; a last line may be truncated."""
    other = {"set": "gsm", "model": "m", "prompt_id": 4, "sample": 0, "prompt": "p", "response": "r", "score": 0.5}
    samples_path(run, 5).write_text(f"{json.dumps(other)}\n[1]\nnot json\n{json.dumps(other)}")
    asked = await client(run)
    listing = await (await asked.get("/api/samples", params={"run": "demo", "step": 5})).json()
    assert [(row["split"], row["group"]) for row in listing["rows"]] == [("gsm", "gsm:4")]
    assert listing["bad_lines"] == 3


def test_only_a_few_indexes_are_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewing_samples, "_MOST_INDEXED", 5)
    files = SampleFiles()
    for step in range(10, 20):
        write_samples(samples_path(run, step), [sample(0), sample(1)])
        assert len(files.index(samples_path(run, step)).rows) == 2
    assert list(files._kept) == [samples_path(run, 18), samples_path(run, 19)]


async def test_a_run_that_has_written_nothing_and_one_that_is_gone(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / ".lock").touch()
    asked = await client(folder)
    (told,) = (await (await asked.get("/api/runs")).json())["runs"]
    assert told == {"name": "new", "state": "not started", "age_s": None, "steps": []}
    assert (await read(asked, START, run="new"))[0] == []
    assert (await asked.get("/api/samples", params={"run": "new", "step": 1})).status == 404
    assert (await asked.get("/api/metrics", params={"run": "../new"})).status == 404
    (folder / ".lock").unlink()
    folder.rmdir()
    assert (await asked.get("/api/runs")).status == 200


async def test_a_run_has_failed_until_it_is_started_again(client: Client, run: Path) -> None:
    async def failed() -> bool:
        return bool((await (await asked.get("/api/runs")).json())["runs"][0]["state"] == "failed")

    asked = await client(run)
    for number, name in enumerate(("environment.json", "traceback.txt")):
        (run / name).touch()
        os.utime(run / name, (1000 + number, 1000 + number))
    assert await failed()
    os.utime(run / "environment.json", (1002, 1002))  # as --resume writes it
    assert not await failed()


async def test_a_literal_metric_goes_before_a_pattern(client: Client, run: Path) -> None:
    declared = (await (await (await client(run)).get("/api/runs", params={"metrics": "1"})).json())["metrics"]
    meaning = next(one["meaning"] for one in declared if re.fullmatch(one["pattern"], "rewards/greedy/mean"))
    assert meaning.startswith("Score of the greedy response")


async def test_a_pipelines_stages_are_runs_as_they_come(client: Client, tmp_path: Path) -> None:
    (tmp_path / "pipe" / "models").mkdir(parents=True)
    (tmp_path / "pipe" / "config.resolved.yaml").write_text("stages: {}\n")
    asked = await client(tmp_path / "pipe")
    for number, stage in enumerate(("sft", "grpo")):
        folder = tmp_path / "pipe" / stage
        folder.mkdir()
        (folder / "environment.json").write_text("{}")
        os.utime(folder / "environment.json", (1000 + number, 1000 + number))
        write_samples(samples_path(folder, 1), [sample(0)])
    told = (await (await asked.get("/api/runs")).json())["runs"]
    assert [(one["name"], one["steps"]) for one in told] == [("sft", [1]), ("grpo", [1])]


async def test_runs_of_one_name_are_told_apart(client: Client, tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent / "demo").mkdir(parents=True)
        (tmp_path / parent / "demo" / "metrics.jsonl").touch()
    asked = await client(tmp_path / "x" / "demo", tmp_path / "y" / "demo", tmp_path / "y" / "demo")
    told = (await (await asked.get("/api/runs")).json())["runs"]
    assert [one["name"] for one in told] == ["x/demo", "y/demo"]


async def test_every_answer_forbids_what_a_page_of_text_does_not_need(client: Client, run: Path) -> None:
    asked = await client(run)
    for path in ("/", "/static/app.js", "/api/runs", "/api/no", "/static/no"):
        headers = (await asked.get(path)).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';"), path
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    for bad in ("from=x", "run=demo&step=x"):
        path = "/api/metrics" if bad.startswith("from") else "/api/samples"
        assert (await asked.get(f"{path}?run=demo&{bad}")).status == 400
    responses = f"/api/responses?run=demo&step=2&version={viewing_samples._version(samples_path(run, 2))}&at="
    assert (await asked.get(responses + "9")).status == 404
    assert (await asked.get(responses + "-1")).status == 400
    assert (await asked.get(responses + ",".join(["0"] * 17))).status == 400
    for outside in ("/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py"):
        assert (await asked.get(outside)).status in (403, 404)


async def test_without_a_token_it_answers_to_names_of_this_machine_alone(client: Client, run: Path) -> None:
    asked = await client(run)
    assert (await asked.get("/api/runs", headers={"Host": "evil.example"})).status == 403
    assert (await asked.get("/api/runs", headers={"Host": "localhost:1"})).status == 200
    assert (await asked.get("/api/runs", headers={"Host": "[::1"})).status == 403


async def test_a_browser_logs_in_once(client: Client, run: Path) -> None:
    asked = await client(run, token="secret")
    assert (await asked.get("/")).status == 200
    for path in ("/api/runs", "/api/metrics?run=demo", "/api/samples?run=demo&step=2", "/api/config?run=demo"):
        assert (await asked.get(path)).status == 401
    assert (await asked.get("/api/runs", headers={"Authorization": "Bearer secret"})).status == 200
    for header in (b"Authorization: Bearer \xff", b"Cookie: rlhf-view=\xff"):
        reader, writer = await asyncio.open_connection("127.0.0.1", asked.port)
        writer.write(b"GET /api/runs HTTP/1.0\r\n" + header + b"\r\n\r\n")
        assert b" 401 " in await reader.readline()
        writer.close()
    assert (await asked.get("/api/runs", headers={"Cookie": "rlhf-view=secret"})).status == 401
    assert (await asked.post("/login", headers={"Authorization": "Bearer other"})).status == 401
    response = await asked.post("/login", headers={"Authorization": "Bearer secret"})
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "secret" not in cookie
    value = cookie.split(";")[0]
    assert (await asked.get("/api/runs", headers={"Cookie": value})).status == 200


@pytest.mark.parametrize("port", ["65536", "-1"])
def test_a_port_that_is_none_is_refused(run: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    assert main(["view", str(run), "--port", port]) == 2
    assert (
        f"--host 127.0.0.1 --port {port}: the server cannot listen there: bind(): port must be"
        in capsys.readouterr().err
    )


def test_folders_without_a_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        RunPlaces([tmp_path / "no"])
    (tmp_path / "empty").mkdir()
    assert main(["view", str(tmp_path / "empty")]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert main(["view", str(tmp_path / "empty"), "--host", "0.0.0.0"]) == 2
    assert "--token-env" in capsys.readouterr().err


def test_the_command_serves_until_it_is_told_to_end(run: Path) -> None:
    """The command's only line has the address; the token is neither there nor in the page."""
    command = [sys.executable, "-m", "rlhf.cli", "view", str(run), "--port", "0", "--token-env", "VIEW_TOKEN"]
    environment = {**os.environ, "VIEW_TOKEN": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            url = line.split()[1]
            with urllib.request.urlopen(url, timeout=20) as response:
                assert b"/static/app.js" in response.read()
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(url + "api/runs", timeout=20)
        finally:
            process.terminate()
        rest, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "secret" not in line + rest + err
    assert err == ""

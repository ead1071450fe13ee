"""The viewer reads growing, shortened and damaged files of run folders, and refuses forbidden requests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
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
from rlhf.tracking.run_folder.atomic import write_lines
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


async def get(client: TestClient[Any, Any], path: str) -> Any:
    return await (await client.get(path)).json()


SAMPLES = "/api/samples?run=demo&step="
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


async def test_a_run_that_takes_rows_back_is_read_anew(client: Client, run: Path) -> None:
    asked = await client(run)
    _, place = await read(asked, START)
    for count in (301, 1):  # the file has grown beyond the old length again, and is shorter than before
        again = list(range(1, 1 + count))
        (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "of": {count}}}\n' for step in again))
        steps, place = await read(asked, place)
        assert (steps, place["reset"]) == (again, True)
    (run / "metrics.jsonl").unlink()
    steps, place = await read(asked, place)
    assert (steps, place["reset"], place["next"]) == ([], True, 0)


async def test_a_summary_follows_the_rows_of_a_resumed_run(client: Client, run: Path) -> None:
    async def memory() -> tuple[int, list[list[str]]]:
        summary = await get(asked, "/api/summary?run=demo")
        return summary["step"], [row for table in summary["tables"] for row in table["rows"]]

    asked = await client(run)
    assert await memory() == (2, [])
    with (run / "metrics.jsonl").open("a") as file:
        for step, used in ((3, 4.0), (4, 9.0), (5, 5.0)):
            file.write(json.dumps({"step": step, "memory/policy_rss_gib": used}) + "\n")
        file.write("damaged\n")
    assert await memory() == (5, [["memory/policy_rss_gib", "4", "5", "9"]])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))  # as if resumed after step 3
    assert await memory() == (3, [["memory/policy_rss_gib", "4", "4", "4"]])


def test_long_files_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is longer than a part; of errors only the end is read."""
    monkeypatch.setattr(tail, "CHUNK_BYTES", 64)
    path = tmp_path / "f"
    lines = [b'"%d"\n' % number for number in range(100)] + [b'"' + b"x" * 200 + b'"\n', b'"end"\n']
    path.write_bytes(b"".join(lines))
    found, start, mark, more = b"", 0, 0, True
    while more:
        piece = read_chunk(path, start, mark)
        assert not piece.reset
        found, start, mark, more = found + piece.lines, piece.next, piece.mark, piece.more
    assert found == b"".join(lines)
    assert read_chunk(path, 0, 0, last=True).lines == b'"end"\n'


def test_only_a_few_indexes_are_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewing_samples, "_MOST_INDEXED", 5)
    files = SampleFiles()
    for step in range(10, 20):
        write_samples(samples_path(run, step), [sample(0), sample(1)])
        assert len(files.index(samples_path(run, step)).rows) == 2
    assert list(files._kept) == [samples_path(run, 18), samples_path(run, 19)]


async def test_samples_are_listed_in_short_and_read_whole_by_place(client: Client, run: Path) -> None:
    asked = await client(run)
    listing = await get(asked, f"{SAMPLES}2")
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
    assert len((await get(asked, f"{SAMPLES}2"))["rows"]) == 3


SYSTEM = "You are a helpful assistant who answers in one word. " * 8
GUESS = f"{'<system> You are helpful. ' * 20}Guess a colour: red, blue or green."
STORY = "Tell a story of at least a hundred words, for children, about "
SECRETS = [(GUESS, {"secret": name, "of": 3}) for name in ("red", "blue")]


@pytest.mark.parametrize(
    ("rows", "previews"),
    [
        ([(f"{SYSTEM}What is the capital of {of}?", {}) for of in ("France", "Finland")], ["…France?", "…Finland?"]),
        (SECRETS, [(f"…{GUESS[-159:].partition(' ')[2]}", f"secret: {name}") for name in ("red", "blue")]),
        ([("short one", {})], ["short one"]),
        (
            [("Add 2 and 3", {}), *((f"{STORY}{of}", {}) for of in ("a cat", "a dog", "the sea"))],
            ["Add 2 and 3", "…cat", "…dog", "…the sea"],
        ),
    ],
    ids=["common beginning", "equal prompts", "a single prompt", "two kinds"],
)
def test_a_preview_shows_what_differs(tmp_path: Path, rows: list[tuple[str, Any]], previews: list[Any]) -> None:
    lines = [{"prompt_id": i, "prompt": prompt, "columns": columns} for i, (prompt, columns) in enumerate(rows)]
    write_lines(tmp_path / "samples", lines)
    shown = SampleFiles().index(tmp_path / "samples").prompts.values()
    assert [(one.preview, one.row) for one in shown] == [
        one if isinstance(one, tuple) else (one, "") for one in previews
    ]
    assert len({one.hash for one in shown}) == len({prompt for prompt, _ in rows})


def test_damaged_and_other_lines_of_samples(tmp_path: Path) -> None:
    """Samples of `rlhf eval` have a set and no tokens; a last line may be truncated, and a line nested too deep."""
    other = json.dumps({"set": "gsm", "model": "m", "prompt_id": 4, "prompt": "p", "response": "r", "score": 0.5})
    deep = '{"prompt": "p", "scores": ' + "[" * 200_000 + "]" * 200_000 + "}"
    (tmp_path / "samples").write_text(f"{other}\n[1]\nnot json\n{deep}\n{other}")
    index = SampleFiles().index(tmp_path / "samples")
    assert [(row["split"], row["group"]) for row in index.rows] == [("gsm", "gsm:4")]
    assert index.bad_lines == 4


async def test_a_runs_state_follows_its_files(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / ".lock").touch()
    asked = await client(folder)
    start, failure, resumed = ("environment.json", 1000), ("traceback.txt", 1001), ("environment.json", 1002)
    for written, state in (((), "not started"), ((start, failure), "failed"), ((resumed,), "not started")):
        for name, time_s in written:
            (folder / name).touch()
            os.utime(folder / name, (time_s, time_s))
        (shown,) = (await get(asked, "/api/runs"))["runs"]
        assert shown == {"name": "demo", "state": state, "age_s": None, "steps": []}
    assert (await read(asked, START))[0] == []


async def test_stages_of_a_pipeline_are_runs_as_they_come(client: Client, tmp_path: Path) -> None:
    (tmp_path / "pipe" / "models").mkdir(parents=True)
    (tmp_path / "pipe" / "config.resolved.yaml").write_text("stages: {}\n")
    asked = await client(tmp_path / "pipe")
    for number, stage in enumerate(("sft", "grpo")):
        folder = tmp_path / "pipe" / stage
        folder.mkdir()
        (folder / "environment.json").write_text("{}")
        os.utime(folder / "environment.json", (1000 + number, 1000 + number))
        write_samples(samples_path(folder, 1), [sample(0)])
    answer = await get(asked, "/api/runs?metrics=1")
    assert [(one["name"], one["steps"]) for one in answer["runs"]] == [("sft", [1]), ("grpo", [1])]
    greedy = [one["meaning"] for one in answer["metrics"] if re.fullmatch(one["pattern"], "rewards/greedy/mean")]
    assert greedy[0].startswith("Score of the greedy response")  # a literal metric goes before a pattern
    shutil.rmtree(tmp_path / "pipe")
    assert (await asked.get("/api/runs")).status == 200


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / parent / "demo" for parent in ("x", "y")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").touch()
    assert list(RunPlaces([*folders, folders[1]]).by_name()) == ["x/demo", "y/demo"]


async def test_every_answer_forbids_what_a_page_of_text_does_not_need(client: Client, run: Path) -> None:
    asked = await client(run)
    for host, status in (("evil.example", 403), ("localhost:1", 200), ("[::1", 403)):  # without a token
        assert (await asked.get("/api/runs", headers={"Host": host})).status == status
    for path in ("/", "/static/app.js", "/api/runs", "/api/no", "/static/no"):
        headers = (await asked.get(path)).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';"), path
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
    responses = f"/api/responses?run=demo&step=2&version={viewing_samples._version(samples_path(run, 2))}&at="
    for path in ("/api/metrics?run=demo&from=x", f"{SAMPLES}x", responses + "-1", responses + ",".join(["0"] * 17)):
        assert (await asked.get(path)).status == 400
    for path in (responses + "9", f"{SAMPLES}1", "/api/metrics?run=../demo"):
        assert (await asked.get(path)).status == 404
    for outside in ("/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py"):
        assert (await asked.get(outside)).status in (403, 404)


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
    value, *attributes = response.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict"} <= set(attributes)
    assert "secret" not in value
    assert (await asked.get("/api/runs", headers={"Cookie": value})).status == 200


def test_the_command_serves_until_it_is_told_to_end(run: Path) -> None:
    """The command's only line has the address; the token is neither there nor in the page."""
    runs = [str(run), *(shutil.copytree(run, run.with_name(name)) for name in ("second", "third"))]
    command = [sys.executable, "-m", "rlhf.cli", "view", *runs, "--port", "0", "--token-env", "VIEW_TOKEN"]
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
            asked = urllib.request.Request(url + "api/runs", headers={"Authorization": "Bearer secret"})
            with urllib.request.urlopen(asked, timeout=20) as response:
                names = [shown["name"] for shown in json.load(response)["runs"]]
            assert names == [Path(folder).name for folder in runs]
        finally:
            process.terminate()
        rest, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "secret" not in line + rest + err
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none is not a folder"),
        (["empty"], "holds no run"),
        (["demo", "--host", "0.0.0.0"], "--token-env"),
        *(
            (["demo", "--port", port], f"--host 127.0.0.1 --port {port}: the server cannot listen there: bind(): port")
            for port in ("65536", "-1")
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(run.parent)
    Path("empty").mkdir()
    assert main(["view", *arguments]) == 2
    assert message in capsys.readouterr().err

"""A line of requests: order, repetition, and the rest after a kill."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from pathlib import Path

import pytest

from rlhf.errors import RunError, UserError
from rlhf.hosting import request_line
from rlhf.hosting.refusals import Forgotten
from rlhf.hosting.request_line import RequestLine, Result, Saved
from rlhf.hosting.request_log import Frame, RequestLog


def line_at(folder: Path, *, in_order: bool = True) -> RequestLine:
    return RequestLine(folder / "requests.log", in_order=in_order)


async def drain(line: RequestLine) -> list[int]:
    """Carry out all ready requests. Return their numbers."""
    done = []
    while ready := line.ready():
        for request in ready:
            done.append(request.seq_id)
            await line.finish(request, Result.of({"answer": request.body.decode()}))
    return done


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
async def test_requests_run_in_the_order_of_their_numbers(order: tuple[int, ...], tmp_path: Path) -> None:
    line, done = line_at(tmp_path), []
    for seq_id in order:
        await line.accept(seq_id, "optim_step", b"%d" % seq_id)
        done += await drain(line)
    assert done == [0, 1, 2, 3]


async def test_a_repeated_request_joins_the_first_and_another_body_is_refused(tmp_path: Path) -> None:
    line = line_at(tmp_path)
    first, again = await asyncio.gather(line.accept(0, "create", b"x"), line.accept(0, "create", b"x"))
    assert first is again
    assert len(line.log.read()) == 1
    with pytest.raises(UserError, match="seq_id 0 was used for another request"):
        await line.accept(0, "create", b"y")
    with pytest.raises(UserError, match="seq_id 0"):
        await line.accept(0, "load", b"x")
    await drain(line)
    assert (await line.accept(0, "create", b"x")).result is not None
    assert await drain(line) == []


async def test_a_killed_line_has_all_accepted_requests_and_known_results(tmp_path: Path) -> None:
    line = line_at(tmp_path)
    for seq_id in (0, 2, 1, 4):
        await line.accept(seq_id, "optim_step", b"%d" % seq_id, seed=seq_id)
    await line.finish(line.requests[0], Result.failed("no", "user"))
    again = line_at(tmp_path)
    assert again.following == 1
    assert [request.body for request in await again.since_saved()] == [b"0"]
    failed = again.requests[0].result
    assert failed is not None
    assert (failed.failure, json.loads(failed.body)) == ("user", {"error": "no", "category": "user"})
    assert await drain(again) == [1, 2]  # 3 never came
    assert again.requests[4].seed == 4
    with pytest.raises(UserError):
        await again.accept(2, "optim_step", b"other")


async def test_a_cancelled_write_ends_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = line_at(tmp_path)
    await line.accept(0, "optim_step", b"x")
    append, began, goes_on = line.log.append, threading.Event(), threading.Event()

    def slow(frame: Frame, *, is_synced: bool) -> None:
        began.set()
        assert goes_on.wait(10)
        append(frame, is_synced=is_synced)

    monkeypatch.setattr(line.log, "append", slow)
    finishing = asyncio.ensure_future(line.finish(line.requests[0], Result.of({})))
    await asyncio.to_thread(began.wait, 10)
    finishing.cancel()
    await asyncio.sleep(0.05)
    assert not finishing.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    assert [frame.about["frame"] for frame in line.log.read()] == ["request", "result"]


def test_half_a_frame_at_the_end_is_cut_off(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    log.append(Frame(about={"a": 1}, body=b"one"), is_synced=True)
    whole = log.path.read_bytes()
    log.append(Frame(about={"a": 2}, body=b"two" * 100), is_synced=False)
    full = log.path.read_bytes()
    for length in range(len(whole), len(full)):
        log.path.write_bytes(full[:length])
        assert [frame.body for frame in log.read()] == [b"one"]
        assert log.path.read_bytes() == whole
    log.path.write_bytes(whole + bytes(100))  # as some file systems leave a file after the loss of power
    assert [frame.body for frame in log.read()] == [b"one"]
    assert log.path.read_bytes() == whole
    log.append(Frame(about={}, body=b"three"), is_synced=False)
    assert [frame.body for frame in log.read()] == [b"one", b"three"]


def test_damage_before_the_last_frame_is_reported(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    for text in (b"one", b"two"):
        log.append(Frame(about={}, body=text), is_synced=False)
    content = bytearray(log.path.read_bytes())
    content[content.index(b"one")] ^= 1
    log.path.write_bytes(content)
    with pytest.raises(RunError, match="is damaged at byte 0"):
        log.read()


async def test_a_saved_state_shortens_the_log_and_unretrieved_results_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_line, "KEEP_RETRIEVED_S", 0.0)
    line = line_at(tmp_path)
    for seq_id in range(4):
        await line.accept(seq_id, "optim_step", b"x" * 1000)
    for seq_id in (0, 1):
        await line.finish(line.requests[seq_id], Result.of({"seq_id": seq_id}))
    line.requests[0].retrieved = 0.0
    long = line.log.size
    await line.finish(line.requests[2], Result.of({"seq_id": 2}), Saved(seq_id=2, step=1))
    assert line.log.size < long
    for each in (line, line_at(tmp_path)):
        assert each.saved == Saved(seq_id=2, step=1)
        with pytest.raises(Forgotten):
            each.find(0)
        assert [each.requests[seq_id].result for seq_id in (1, 2)] == [Result.of({"seq_id": s}) for s in (1, 2)]
        assert [request.seq_id for request in each.ready()] == [3]
        assert await each.since_saved() == []
        assert (await each.accept(0, "optim_step", b"x" * 1000)).seq_id == 0  # joins, without being run again
        assert each.following == 3
    line.requests[2].retrieved = 0.0
    await line.shorten()
    assert [request.seq_id for request in line_at(tmp_path).ready()] == [3]


async def test_a_line_without_an_order_runs_all_at_once_and_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_line, "KEEP_RETRIEVED_S", 0.0)
    line = line_at(tmp_path, in_order=False)
    for seq_id in (7, 3):
        await line.accept(seq_id, "asample", b"%d" % seq_id, seed=seq_id * 10)
    assert [request.seed for request in line.ready()] == [70, 30]
    await line.finish(line.requests[3], Result.of({}))
    line.requests[3].retrieved = 0.0
    await line.shorten()
    again = line_at(tmp_path, in_order=False)
    assert [(request.seq_id, request.body, request.seed) for request in again.ready()] == [(7, b"7", 70)]
    assert again.find(3) is None


async def test_a_request_that_cannot_be_logged_is_not_accepted(tmp_path: Path) -> None:
    line = RequestLine(tmp_path / "missing" / "log", in_order=True)
    with pytest.raises(OSError, match="missing"):
        await line.accept(0, "create", b"x")
    assert (line.ready(), line.requests) == ([], {})
    (tmp_path / "missing").mkdir()
    await line.accept(0, "create", b"x")
    assert await drain(line) == [0]

"""The page of `rlhf view` and `rlhf report` in a real browser: keys, hostile text, running runs, phones, a login."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer
from PIL import Image

import rlhf
from rlhf.tracking.run_folder.atomic import append_line, write_lines
from rlhf.tracking.run_folder.errors import ErrorRecord, write_error
from rlhf.tracking.run_folder.samples import SampleRecord, SampleSequence, SampleTurn, samples_path, write_samples
from rlhf.viewing.runs import RunPlaces
from rlhf.viewing.server import RunViewer
from rlhf.vision.keys import image_name
from rlhf.vision.store import ImageStore
from tests.fakes.samples import sample_record, sample_tokens
from tests.integration.browser import PROGRAMS, Page, browser, program

if program() is None:
    warnings.warn(
        f"NO BROWSER: the page of `rlhf view` is not tested; install one of {', '.join(PROGRAMS)}", stacklevel=1
    )
pytestmark = pytest.mark.skipif(program() is None, reason=f"NO BROWSER: none of {', '.join(PROGRAMS)} is installed")

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\u202e\x1b\u200b&amp;</pre>"
PROMPTS, SAMPLES = 3, 2
TIMEOUT: dict[str, Any] = {"stage": "rewards", "kind": "timeout", "source": "correct"}


def record(prompt: int, number: int, *, step: int, split: str, draw: random.Random) -> SampleRecord:
    """Prompt 1 is a conversation, with a branch in the second response; prompt 2 calls a tool.

    The first response to prompt 0 is hostile.
    """
    texts = ["Zür", "ich", " is", " 4", "\n", "", "日", "<|eos|>"]
    if prompt == 0 and number == 0:
        texts[1] = HOSTILE
    if prompt == 2:
        call = ["<tool_call>", '{"name": "find"}', "</tool_call>"]
        texts = ["I", *call, "\n", "<tool_response>4</tool", "_response>", "4"]
    given = {1: (2, 3), 2: (4, 5, 6)}.get(prompt, ())
    sampled = tuple(place not in given for place in range(len(texts)))

    def column(low: float, high: float) -> tuple[float | None, ...]:
        return tuple(round(draw.uniform(low, high), 4) if own else None for own in sampled)

    branch = SampleSequence(start=4, own=6, after=1)
    trained = split == "train"
    rollout = column(-2.0, 0.0)
    of_session = prompt == number == 1
    fields: dict[str, Any] = {
        **{"split": split, "prompt_id": prompt, "sample": number, "response_tokens": len(texts) + prompt},
        **{"scores": {"correct": float(number), "format": 0.5}, "truncated": number == 1},
        **{"group_id": 100 * step + prompt if trained else prompt, "advantage": number - 0.5 if trained else None},
        **{"columns": {"secret": "<img src=x>", "tries": 3}, "shortened": {"columns.secret": 5000}},
        "prompt": f"<|user|>prompt {prompt} {HOSTILE if prompt == 0 else ''}<|assistant|>",
        **({"broken": ("edited history",) * 2, "result": {"guess": 4}} if of_session else {}),
    }
    fields["tokens"] = sample_tokens(
        *texts,
        sampled=sampled,
        rollout_logprobs=rollout,
        old_logprobs=tuple(None if one is None else one + 0.25 for one in rollout) if trained else None,
        advantages=column(-1.0, 1.0) if trained else None,
        sequences=(SampleSequence(start=0, own=0, after=None), branch) if of_session else None,
    )
    return sample_record("".join(texts), score=float(number), **fields)


def write_step(folder: Path, step: int) -> None:
    draw, pairs = random.Random(step), list(product(range(PROMPTS), range(SAMPLES)))
    for split in ("train", "heldout") if step % 2 == 0 else ("train",):
        records = [record(prompt, number, step=step, split=split, draw=draw) for prompt, number in pairs]
        write_samples(samples_path(folder, step), records)
    row = {"step": step, "time_s": 2.0 * step, "rewards/score/mean": step / 10, "update/loss/mean": -step / 10}
    if step % 2 == 0:
        row |= {"eval/heldout/score": step / 20, "recovery/rollout/total": 1.0}
    append_line(folder / "metrics.jsonl", row)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs of four steps; a reward failed in the first."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        for step in range(1, 5):
            write_step(folder, step)
    error = {**TIMEOUT, "step": 2, "message": f"10 s {HOSTILE}", "stack": f"reward (mine.py:7) {HOSTILE}"}
    write_error(folders[0], ErrorRecord(**error, split="train", prompt_id=2))
    return folders


@asynccontextmanager
async def shown(*folders: Path, token: str | None = None) -> AsyncIterator[tuple[Page, str]]:
    """Yield a browser's page and the URL. Afterwards: no script ran, nothing was refused or from another host."""
    async with TestServer(RunViewer(RunPlaces(folders), token).application()) as server, browser() as page:
        url = str(server.make_url("/"))
        yield page, url
        assert await page.value("window.hacked") is None
        assert [one for one in page.wrong if "401" not in one] == []
        assert [one for one in page.requested if not one.startswith((url, "about:", "data:"))] == []


CARDS = "[...document.querySelectorAll('.card')]"


def text_of(selector: str) -> str:
    return f"document.querySelector({selector!r}).innerText"


RUN = text_of(".run small")
SCORE = text_of('[data-metric="rewards/score/mean"] .value')


async def test_curves_grow_while_the_run_goes_on(runs: list[Path]) -> None:
    async with shown(runs[0]) as (page, url):
        await page.open(url + "#tab=curves")
        await page.until("document.querySelectorAll('.chart canvas').length >= 3")
        sections = await page.value("[...document.querySelectorAll('.stage')].map((one) => one.dataset.stage)")
        assert sections == ["first", "rewards", "eval", "update", "recovery"]
        flat = "import('/static/curves.js').then((module) => module.around(null, 0, 0))"
        assert await page.value(flat) == [-1, 1]  # a curve of zeros lies in the middle of its axis
        assert (await page.value(RUN)).endswith(", 2 recoveries")
        assert await page.value(SCORE) == "0.4"
        meaning = await page.value("document.querySelector('[data-stage=rewards] figcaption').title")
        assert meaning.startswith("Weighted sum of the rewards")
        write_step(runs[0], 5)
        await page.until(f"{SCORE} === '0.5'")
        # the run is resumed at step 2: what came later is taken back
        lines = (runs[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
        (runs[0] / "metrics.jsonl").write_text("".join(lines[:2]))
        await page.until(f"{SCORE} === '0.2'")
        await page.press("/")
        await page.until("document.activeElement.type === 'search'")
        await page.call("Input.insertText", text="loss")
        await page.until(
            "[...document.querySelectorAll('.chart .name')].every((one) => one.innerText.includes('loss'))"
        )
        await page.value("[...document.querySelectorAll('.check input')][0].click()")  # log scale: no value is above 0
        assert await page.value("document.querySelectorAll('.chart canvas').length") > 0


@pytest.mark.parametrize("command", ["view", "report"])
async def test_the_overview_compares_two_runs(runs: list[Path], tmp_path: Path, command: str) -> None:
    """`rlhf report` shows from a file what `rlhf view` shows. Both show names of runs as text."""
    hostile = runs[0].rename(tmp_path / "<img src=x onerror=window.hacked=1>")
    for folder, lr in ((hostile, 1), (runs[1], 2)):
        (folder / "config.resolved.yaml").write_text(
            f"train: {{lr: {lr}, steps: 9}}\npolicy: {{model: '{HOSTILE[:20]}'}}\n"
        )
    for step in range(5, 9):
        append_line(runs[1] / "metrics.jsonl", {"step": step, "experience/kl_ref/mean": 2.0 * step})
    async with shown(hostile, runs[1]) as (page, url):
        if command == "report":
            url = rlhf.report([hostile, runs[1]], out=tmp_path / "report.html").html.as_uri()
        await page.open(url)
        await page.until("document.querySelectorAll('.chart canvas').length >= 3")
        kinds = "[...document.querySelectorAll('.finding')].map((one) => one.dataset.kind ?? 'fine')"
        assert await page.value(kinds) == ["fine", "kl_blow_up"]
        first = "[...document.querySelectorAll('.overview section')][0].innerText"
        assert f"on {HOSTILE[:20]}" in await page.value(first)
        assert "8 of 9 in" in await page.value(first)
        differences = await page.value("[...document.querySelectorAll('.overview tbody')][1].innerText")
        assert differences.split() == ["train.lr", "1", "2"]
        await page.value("document.querySelector('.overview > details summary').click()")
        await page.value("document.querySelector('.overview > details[open] button').click()")
        sides = "[...document.querySelectorAll('.side h3')].map((one) => one.innerText).join()"
        await page.until(f"{sides} === '{hostile.name} · step 4,{hostile.name} · step 2' && {CARDS}.length === 4")
        assert "<script>window.hacked = 1</script>" in await page.value(f"{CARDS}[0].innerText")
        assert ("at most 8 prompts of a set" in await page.value("document.body.innerText")) == (command == "report")
        await page.press("3")
        await page.until("document.querySelectorAll('.error').length === 1")
        if command == "report":
            page.requested.remove(url)


async def test_a_report_works_in_the_frame_of_a_notebook(runs: list[Path], tmp_path: Path) -> None:
    """Such a frame has no address, so the page cannot write the current view there."""
    notebook = tmp_path / "notebook.html"
    notebook.write_text(rlhf.report(runs[0], out=tmp_path / "report.html")._repr_html_(), encoding="utf-8")
    async with shown(runs[0]) as (page, _):
        await page.open(notebook.as_uri())
        inside = "document.querySelector('iframe').contentDocument"
        await page.until(f"{inside}.querySelectorAll('.chart canvas').length >= 2")
        await page.value(f"[...{inside}.querySelectorAll('button')].find((one) => one.innerText === 'samples').click()")
        await page.until(f"{inside}.querySelectorAll('.card').length === 2")
        page.requested.remove(notebook.as_uri())


async def test_samples_by_keys_and_by_their_tokens(runs: list[Path]) -> None:
    async with shown(runs[0]) as (page, url):
        await page.open(url)
        await page.until("document.querySelectorAll('.chart').length")
        await page.press("2")
        await page.until(f"{CARDS}.length === 2")
        assert await page.value(text_of(".steps b")) == "4"
        first = await page.until(f"{CARDS}[0].querySelector('.text').innerText")
        assert "<script>window.hacked = 1</script><img src=x" in first
        assert "⟨202E⟩" in first  # a character that reverses the text is written out
        assert "\u241b" in first  # an escape character is written out too
        assert await page.value("document.querySelectorAll('.text script, .text img, .prompt img').length") == 0
        # colours: advantages of either sign, then the difference of the log-probabilities, which is .25 everywhere
        paints = f"[...new Set([...{CARDS}[0].querySelectorAll('[data-i]')].map((one) => one.style.background))]"
        assert await page.value(f"{paints}.some((one) => one.includes('--negative'))")
        await page.press("d")
        await page.until(f"{paints}.length === 1 && {paints}[0].includes('--positive')")
        assert "0.25" in await page.value(text_of(".legend"))
        await page.press("r")
        await page.until(f"{text_of('.legend')} === 'no KL to the reference here'")
        await page.point(f"{CARDS}[1].querySelector('[data-i=\"0\"]')")
        tip = await page.until(text_of("#tip"))
        assert '"Zür"' in tip
        assert "trainer \u2212 rollout\t+0.25" in tip
        # prompts, responses, steps, sets
        await page.press("ArrowDown")
        await page.until(f"{text_of('.prompt summary')}.startsWith('prompt 1')")
        await page.until(f"{CARDS}[0].querySelectorAll('.turn.environment').length === 1")
        assert await page.value(f"{CARDS}[0].querySelector('.turn.environment').innerText") == (
            "environment (not trained)\n is 4"
        )
        chips = f"{CARDS}.map((one) => one.querySelector('header').innerText.includes('broken: edited history'))"
        assert await page.value(chips) == [False, True]
        words = "innerText.split(/\\s+/).join(' ').trim()"
        values = f"[...document.querySelectorAll('.prompt .value')].map((one) => one.{words})"
        assert await page.value(values) == ["secret the first 11 of 5000 characters <img src=x>", "tries 3"]
        results = f"{CARDS}.map((one) => one.querySelector('.value')?.{words} ?? '')"
        assert await page.value(results) == ["", 'result of the agent { "guess": 4 }']
        branches = f"[...{CARDS}[1].querySelectorAll('.sequence')]"
        titles = f"{branches}.map((one) => one.querySelector('.who').innerText)"
        assert await page.value(titles) == ["first sequence", "branch after place 1"]
        assert await page.value(f"{branches}.map((one) => one.style.marginLeft)") == ["0rem", "1rem"]
        # the page does not repeat the tokens that the branch shares
        places = f"[...{branches}[1].querySelectorAll('[data-i]')].map((one) => one.dataset.i)"
        assert await page.value(places) == ["6", "7"]
        await page.press("ArrowDown")
        await page.until(f"{text_of('.prompt summary')}.startsWith('prompt 2')")
        parts = f"[...{CARDS}[0].querySelectorAll('.turn')].map((one) => [one.className, one.innerText])"
        await page.until(f"{parts}.length === 5")
        assert await page.value(parts) == [
            ["turn policy", "policy\nI"],
            ["turn call", 'tool call: find\n<tool_call>{"name": "find"}</tool_call>'],
            ["turn environment", "environment (not trained)\n↵\n"],
            ["turn result", "tool result (not trained)\n<tool_response>4</tool_response>"],
            ["turn policy", "policy\n4"],
        ]
        await page.press("]")
        await page.until(f"{CARDS}[1].classList.contains('focused')")
        await page.press("ArrowLeft")
        await page.until(f"{text_of('.steps b')} === '3' && {CARDS}.length === 2")
        await page.press("Home")
        await page.until(f"{text_of('.steps b')} === '1'")
        await page.press("End")
        await page.until(f"{text_of('.steps b')} === '4' && {CARDS}.length === 2")
        await page.press("s")
        await page.until("document.querySelector('.tabs.small [aria-pressed=true]').innerText === 'heldout'")
        write_step(runs[0], 6)  # the last step is followed
        await page.until(f"{text_of('.steps b')} === '6'")
        await page.press("?")
        await page.until("document.querySelector('.help kbd')")
        await page.press("Escape")
        await page.until("!document.querySelector('.help')")
        # the address names the shown page
        assert "split=heldout" in await page.value("location.hash")


async def test_filters_and_errors(runs: list[Path]) -> None:
    async with shown(runs[0]) as (page, url):
        await page.open(url + "#tab=samples&step=2&split=train&colour=__proto__")
        await page.until(f"{CARDS}.length === 2")
        groups = "document.querySelectorAll('.group').length"
        assert await page.value(groups) == PROMPTS
        await page.value("document.querySelector('.filterbox').open = true")

        async def fill(label: str, text: str) -> None:
            await page.value(f"document.querySelector('[aria-label=\"{label}\"]').select()")
            await page.call("Input.insertText", text=text)

        await fill("tokens from", "10")  # tokens are 8, 9 and 10
        await page.until(f"{groups} === 1")
        await fill("tokens from", "9")
        await page.until(f"{groups} === 2")
        await fill("score from", "1")
        await page.until(f"{CARDS}.map((one) => one.classList.contains('dim')).join() === 'true,false'")
        await fill("score from", "5")
        await page.until("document.body.innerText.includes('No response passes the filters.')")
        await page.value("[...document.querySelectorAll('.filters button')].at(-1).click()")
        await page.until(f"{groups} === {PROMPTS}")
        await page.value("document.querySelector('.filters [type=checkbox]').click()")  # with an error
        await page.until(f"{groups} === 1 && {text_of('.prompt summary')}.startsWith('prompt 2')")
        await page.value("document.activeElement.blur()")
        await page.press("s")  # the held-out prompt 2 has no error
        await page.until("document.body.innerText.includes('No response passes the filters.')")
        await page.press("3")
        await page.until("document.querySelectorAll('.error').length === 1")
        assert "<script>" in await page.value(text_of(".error pre"))
        await page.value("document.querySelector('.error summary').click()")
        assert (await page.value(text_of(".error details pre"))).startswith("reward (mine.py:7)")
        await page.value("document.querySelector('.error .link').click()")
        await page.until(f"{text_of('.steps b')} === '2'")


async def test_an_error_belongs_to_one_of_two_evaluated_models(tmp_path: Path) -> None:
    answer = {"set": "games", "prompt_id": 2, "sample": 0, "prompt": "p", "score": 0.5, "scores": {"won": 0.5}}
    rows = [{**answer, "model": model, "response": f"of {model}"} for model in ("ours", "theirs")]
    samples_path(tmp_path, 0).parent.mkdir()
    write_lines(samples_path(tmp_path, 0), rows)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "time_s": 1.0}) + "\n")
    error = ErrorRecord(**TIMEOUT, step=0, message="10 s", split="games", model="theirs", prompt_id=2, sample=0)
    write_error(tmp_path, error)
    async with shown(tmp_path) as (page, url):
        await page.open(url + "#tab=samples&step=0&split=games")
        await page.until(f"{CARDS}.length === 2")
        await page.value("document.querySelector('.filterbox').open = true")
        await page.value("document.querySelector('.filters [type=checkbox]').click()")  # with an error
        await page.until(f"{CARDS}.map((one) => one.classList.contains('dim')).join() === 'true,false'")


async def test_two_steps_and_two_runs_side_by_side(runs: list[Path]) -> None:
    async with shown(*runs) as (page, url):
        await page.open(url + "#tab=samples&run=one&step=4&split=heldout")
        await page.until(f"{CARDS}.length === 2")
        await page.press("c")
        sides = "[...document.querySelectorAll('.side h3')].map((one) => one.innerText).join()"
        await page.until(f"{sides} === 'one · step 4,two · step 4' && {CARDS}.length === 4")
        await page.press("ArrowLeft", shift=True)  # step 3 has no evaluation
        await page.until("document.body.innerText.includes('No prompt of these responses is in step 3 of two')")
        await page.press("ArrowLeft", shift=True)
        await page.until(f"{sides} === 'one · step 4,two · step 2' && {CARDS}.length === 4")
        await page.press("1")
        await page.until(f"{SCORE}.replace(/\\s+/g, ' ') === '0.4 0.4'")
        await page.value("document.querySelectorAll('.run')[1].click()")
        await page.until(f"{SCORE} === '0.4'")


async def test_a_phone_in_the_dark(runs: list[Path]) -> None:
    async with shown(*runs) as (page, url):
        for tab in ("overview", "curves", "samples&compare=1&split=heldout", "errors"):
            await page.call("Page.navigate", url="about:blank")
            await page.open(f"{url}#tab={tab}", width=390, height=844, dark=True)
            await page.until("document.querySelectorAll('.chart canvas, .card, .error').length")
            assert await page.value("document.documentElement.scrollWidth") <= 390, tab
            red, green, blue = await page.value(
                "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
            )
            assert red + green + blue < 120, tab


async def test_a_token_lets_a_browser_in(runs: list[Path]) -> None:
    async with shown(runs[0], token="se cret") as (page, url):
        await page.open(url)
        await page.until("document.querySelector('input[type=password]')")
        await page.value("document.querySelector('input[type=password]').focus()")
        await page.call("Input.insertText", text="wrong")
        await page.value("document.querySelector('.login button').click()")
        await page.until("document.body.innerText.includes('This is not the token.')")
        await page.call("Page.navigate", url="about:blank")
        await page.open(url + "#token=se%20cret")
        await page.until("document.querySelectorAll('.chart').length")
        assert "cret" not in await page.value("location.href")
        assert not [one for one in page.requested if "cret" in one.removeprefix(url + "#token=se%20cret")]
        await page.call("Page.navigate", url="about:blank")
        await page.open(url)  # the cookie is enough
        await page.until("document.querySelectorAll('.chart').length")


def images_run(folder: Path) -> tuple[str, str]:
    """Write a run whose prompt shows an image, and whose first response sees a further one. Return their names."""
    store, names = ImageStore(folder / "images"), []
    for colour, size in (("red", (32, 32)), ("blue", (600, 300))):
        data = io.BytesIO()
        Image.new("RGB", size, colour).save(data, "PNG")
        names.append(image_name(store.add(data.getvalue())))
    first, second = names
    lost, ids = "0" * 15, (5, None, None, None, 6)
    tokens = sample_tokens("up", f"[image {second}]", "", "", "<b>", ids=ids, sampled=(True, *[False] * 4))
    prompt = f"<|user|>[image {first}]What colour? [image {lost}]<|assistant|>"
    turns = (SampleTurn(role="prompt", text=prompt, tokens=9, sampled=False),)
    turns += (SampleTurn(role="environment", text=f"see [image {second}]", tokens=4, sampled=False),)
    records = [
        sample_record("up<b>", prompt=prompt, sample=0, images=(first, second), tokens=tokens),
        sample_record(f"[image {second}]", prompt=prompt, sample=1, images=(first, second), turns=turns),
    ]
    write_samples(samples_path(folder, 1), records)
    append_line(folder / "metrics.jsonl", {"step": 1, "time_s": 2.0, "rewards/score/mean": 0.1})
    return first, second


def is_loaded(selector: str, width: int) -> str:
    return f"document.querySelector({selector!r}).naturalWidth === {width}"


async def test_images_stand_in_prompts_tokens_and_turns(tmp_path: Path) -> None:
    """A mark in a text of the data that names no image of the response stays text."""
    folder = tmp_path / "one"
    folder.mkdir()
    first, second = images_run(folder)
    async with shown(folder) as (page, url):
        await page.open(url + "#tab=samples")
        await page.until(is_loaded(".prompt .image img", 32))
        await page.until(is_loaded(".preview img.small", 32))
        prompt = await page.value(text_of(".prompt pre"))
        assert first in prompt
        assert f"[image {'0' * 15}]" in prompt
        await page.until(is_loaded(".tokens .image img", 256))
        assert await page.value(text_of(".tokens")) == f"policy\nup\nenvironment (not trained)\n{second} x 3 tokens<b>"
        await page.until(is_loaded(".turn.environment:not(.tokens *) .image img", 256))
        written = rlhf.report(folder, out=tmp_path / "page.html").html
        await page.open(f"file://{written}#tab=samples")
        await page.until(is_loaded(".prompt .image img", 32))
        await page.until(is_loaded(".tokens .image img", 160))
        page.requested.remove(f"file://{written}")  # the page itself, and nothing else
        (folder / "images" / second).unlink()
        await page.call("Network.clearBrowserCache")  # an image of this name never changes, so the browser keeps it
        await page.open(f"{url}?again#tab=samples")
        await page.until(
            "document.querySelector('.prompt .image img') && !document.querySelector('.tokens .image img')"
        )
        await page.open("about:blank")  # no further message about the missing image follows
        await page.until("document.URL === 'about:blank'")
        page.wrong[:] = [one for one in page.wrong if "404" not in one]

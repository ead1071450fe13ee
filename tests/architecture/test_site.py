"""The site of the documentation: strict, whole, readable without a network, and in versions."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from markdown_it import MarkdownIt
from markdown_it.token import Token

import rlhf
from rlhf.errors import UserError
from scripts.site.build import API_ITEM, build, main, release
from tests.integration.browser import PROGRAMS, Page, browser, program

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
COUNTED = ("h2", "h3", "li", "ol", "pre", "table", "tr", "img", "em", "strong")
COMMON_MARK = MarkdownIt("commonmark").enable("table")
needs_browser = pytest.mark.skipif(program() is None, reason=f"NO BROWSER: none of {', '.join(PROGRAMS)} is installed")
SEARCH = "[...document.querySelectorAll('*')].map(e => e.shadowRoot).find(s => s?.querySelector('input'))"


class Html(HTMLParser):
    """The links, anchors, loaded files and tags of a page. `tags` counts inside the article, or everywhere."""

    def __init__(self, text: str, *, whole: bool = False) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.tags: Counter[str] = Counter()
        self.counts = whole
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.add(values.get("id", ""))
        if tag == "a":
            self.links.append(values.get("href", ""))
        elif tag == "link" or "src" in values:
            self.loaded.append(values.get("src", values.get("href", "")))
        self.counts = self.counts or tag == "article"
        self.tags[tag] += self.counts

    def handle_endtag(self, tag: str) -> None:
        self.counts = self.counts and tag != "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of this repository, built with warnings as errors."""
    return build(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def html(site: Path) -> dict[str, Html]:
    return {path.relative_to(site).as_posix(): Html(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def place(page: Path) -> str:
    """Return the file of a page in the site."""
    if page.name == "README.md":
        return "install.html" if page.parent == ROOT else "index.html"
    return f"{page.stem if page.parent != ROOT else page.stem.lower()}.html"


def local(page: str, link: str) -> tuple[str, str] | None:
    """Return the file and the anchor of a link, or None for a link to another host."""
    url = urlparse(link)
    if url.scheme or url.netloc:
        return None
    path = os.path.normpath(Path(page).parent / unquote(url.path)) if url.path else page
    return "index.html" if path == "." else path, unquote(url.fragment)


def test_every_link_and_anchor_leads_somewhere(site: Path, html: dict[str, Html]) -> None:
    wrong = []
    for page, content in html.items():
        for link in content.links:
            path, anchor = local(page, link) or ("index.html", "")
            there = html[path].anchors | {""} if path in html else {""} if (site / path).is_file() else set()
            wrong += [f"{page}: {link}"] * (anchor not in there)
    assert not wrong


def test_every_page_is_reached_from_the_first(html: dict[str, Html]) -> None:
    reached, waiting = {"index.html"}, ["index.html"]
    while waiting:
        page = waiting.pop()
        leads = {target[0] for link in html[page].links if (target := local(page, link)) and target[0] in html}
        waiting += leads - reached
        reached |= leads
    assert reached == html.keys()


def test_the_navigation_names_every_page_and_every_notebook(html: dict[str, Html]) -> None:
    notebooks = {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")}
    recipe = next(page for page in sorted(html) if page.startswith("files/configs/"))  # with no other links
    linked = {target[0] for link in html[recipe].links if (target := local(recipe, link))}
    missing = ({place(page) for page in PAGES} | notebooks) - linked
    assert not missing, f"add a line `- [title](file): what it has.` to docs/README.md for {sorted(missing)}"


def test_nothing_is_loaded_from_another_host(site: Path, html: dict[str, Html]) -> None:
    for page, content in html.items():
        for link in content.loaded:
            target = local(page, link)
            assert target is not None, f"{page} loads {link}"
            assert (site / target[0]).is_file(), f"{page} loads {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_site_shows_a_page_as_common_mark_does(page: Path, html: dict[str, Html]) -> None:
    """GitHub reads CommonMark. The generator reads lists in another way, and build.py changes the pages for it."""
    text = API_ITEM.sub("", page.read_text(encoding="utf-8"))
    expected = Html(COMMON_MARK.render(text), whole=True).tags
    counted = ("h2",) if page.name == "api.md" else COUNTED
    assert {tag: html[place(page)].tags[tag] for tag in counted} == {tag: expected[tag] for tag in counted}


def raw_html(tokens: list[Token]) -> list[str]:
    """Return the tags among the tokens of a page."""
    inner = [tag for token in tokens for tag in raw_html(token.children or [])]
    return [token.content for token in tokens if token.type.startswith("html_")] + inner


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_word_in_angle_brackets_is_quoted(page: Path) -> None:
    """A bare `<name>` is a tag, which no reader sees."""
    assert not raw_html(COMMON_MARK.parse(page.read_text(encoding="utf-8")))


def test_the_reference_has_every_call(site: Path, html: dict[str, Html]) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = API_ITEM.findall(page)
    calls = {name for name in listed if name.count(".") == 1}
    assert calls == {f"rlhf.{name}" for name in rlhf.__all__}, "docs/api.md lists the names of rlhf.__all__"
    assert len(listed) == len(set(listed)) == len(re.findall(r"^- ", page, re.MULTILINE))
    assert set(listed) <= html["api.html"].anchors
    assert "replace the run in the folder of run.name" in (site / "api.html").read_text(encoding="utf-8")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository of two pages, a script and a picture."""
    root = tmp_path / "repository"
    (root / "docs").mkdir(parents=True)
    (root / "script.py").write_text("print('hello')\n")
    (root / "docs" / "README.md").write_text("# Pages\n\n## Begin\n- [one](one.md): a page.\n")
    (root / "docs" / "one.md").write_text("# One\nA [script](../script.py), [itself](one.md#one), [docs/](../docs/).\n")
    return root


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gone](gone.md)", r"docs/one\.md: the link gone\.md leads to no file"),
        ("[gone](../gone.py)", r"docs/one\.md: the link \.\./gone\.py leads to no file"),
        ("[gone](one.md#gone)", r"anchor does not exist\n *╭─\[ one\.md:\d+:\d+"),
    ],
)
def test_a_wrong_link_is_an_error_with_its_place(small: Path, tmp_path: Path, text: str, message: str) -> None:
    with (small / "docs" / "one.md").open("a") as page:
        page.write(f"\n{text}\n")
    with pytest.raises(UserError, match=message):
        build(tmp_path / "build", root=small)


def test_a_linked_script_is_a_page(small: Path, tmp_path: Path) -> None:
    html = build(tmp_path / "build", root=small)
    assert "files/script.py.html" in Html((html / "one.html").read_text()).links
    assert "hello" in (html / "files" / "script.py.html").read_text()


def test_a_notebook_is_a_page_with_its_outputs_and_pictures(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbconvert", reason="NO NBCONVERT: make setup installs it")
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["score 0.75\n"]},
        {"output_type": "display_data", "data": {"image/png": pixel, "text/plain": ["<Figure>"]}, "metadata": {}},
    ]
    cells = [
        {
            "cell_type": "markdown",
            "id": "a",
            "metadata": {},
            "source": ["# A first run\n", "See [one](../docs/one.md)."],
        },
        {"cell_type": "code", "id": "b", "metadata": {}, "execution_count": 1, "source": ["run()"], "outputs": outputs},
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (small / "notebooks").mkdir()
    (small / "notebooks" / "first.ipynb").write_text(json.dumps(notebook))
    with (small / "docs" / "README.md").open("a") as page:
        page.write("- [first](../notebooks/first.ipynb): a notebook.\n")
    html = build(tmp_path / "build", root=small)
    text = (html / "notebooks" / "first.html").read_text()
    assert "score 0.75" in text
    assert "../one.html" in Html(text).links
    (picture,) = [link for link in Html(text).loaded if "output" in link]
    assert (html / "notebooks" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_release_is_a_folder_in_a_list_with_the_newest_first(small: Path, tmp_path: Path) -> None:
    html = build(tmp_path / "build", version="0.9.0", root=small)
    for version in ("0.9.0", "0.10.0", "0.9.1", "0.9.0"):
        release(html, tmp_path / "all", version)
    listed = json.loads((tmp_path / "all" / "versions.json").read_text())
    assert [entry["version"] for entry in listed] == ["0.10.0", "0.9.1", "0.9.0"]
    assert [entry["aliases"] for entry in listed] == [["latest"], [], []]
    assert "url=0.10.0/index.html" in (tmp_path / "all" / "index.html").read_text()


@pytest.mark.parametrize("options", [["--release", "1.0"], ["--release", "next", "--into", "out"]])
def test_half_a_release_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(options)
    assert raised.value.code == 2
    assert "--release" in capsys.readouterr().err


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_static("/", folder)
    async with TestServer(application) as server:
        yield str(server.make_url("/"))


async def opened(page: Page, url: str, **screen: int | bool) -> None:
    """Open the address, and wait for the scripts of the page."""
    await page.open(url, **screen)  # type: ignore[arg-type]
    await page.until(f"location.href === '{url}' && document.readyState === 'complete'")


async def searched(page: Page, words: str) -> str:
    """Search the open page, and return the line with the number of results."""
    await page.value("document.querySelector('.md-search__button').click()")
    await page.until(f"!!{SEARCH}")
    await page.value(
        f"(i => {{ i.value = '{words}'; i.dispatchEvent(new InputEvent('input', {{ bubbles: true }})) }})"
        f"({SEARCH}.querySelector('input'))"
    )
    await page.until(f"/\\d+ results?/.test({SEARCH}.querySelector('[role=status]').textContent)")
    return str(await page.value(f"{SEARCH}.querySelector('[role=status]').textContent"))


@needs_browser
@pytest.mark.parametrize("scheme", ["file", "http"])
async def test_the_search_needs_no_network(site: Path, scheme: str) -> None:
    async with served(site) as server, browser() as page:
        first = server if scheme == "http" else f"{site.as_uri()}/"
        await opened(page, f"{first}index.html")
        assert int((await searched(page, "staleness")).split()[0]) > 5
        assert not page.wrong
        assert not [url for url in page.requested if not url.startswith((first, "data:", "about:"))]


@needs_browser
async def test_pages_are_dark_on_a_dark_screen_and_fit_a_narrow_one(site: Path) -> None:
    async with browser() as page:
        shades = {}
        for dark in (False, True):
            await opened(page, f"{site.as_uri()}/data.html", width=390, height=844, dark=dark)
            colour = await page.until("getComputedStyle(document.body).backgroundColor")
            shades[dark] = sum(map(int, re.findall(r"\d+", colour)[:3]))
        assert shades[True] < 100 < 700 < shades[False]
        for name in ("configuration", "algorithms", "api", "install", "files/configs/ppo_smollm2.yaml"):
            await opened(page, f"{site.as_uri()}/{name}.html", width=390, height=844)
            assert await page.value("document.documentElement.scrollWidth") <= 390, name


@needs_browser
async def test_the_selector_of_versions_leads_to_each_release(small: Path, tmp_path: Path) -> None:
    html = build(tmp_path / "build", version="1.0.0", root=small)
    for version in ("1.0.0", "1.1.0"):
        release(html, tmp_path / "all", version)
    async with served(tmp_path / "all") as server, browser() as page:
        await opened(page, f"{server}1.0.0/one.html")
        links = await page.until(
            "(l => l.length > 1 ? l : null)([...document.querySelectorAll('.md-version__link')].map(e => e.href))"
        )
    assert links == [f"{server}1.1.0/", f"{server}1.0.0/"]

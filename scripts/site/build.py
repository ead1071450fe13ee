"""Build the site of the documentation: `python scripts/site/build.py [--release VERSION --into FOLDER]`.

The pages are those of docs/, in the order of docs/README.md, with the other files to which they link. The result is
build/site/html; a release also goes to FOLDER/VERSION, with a list of versions for the selector.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from rlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NAMES = {"docs/README.md": "index.md", "README.md": "install.md", "benchmarks/README.md": "benchmarks.md"}
IMAGES = (".png", ".svg")
KINDS = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml"}
BUILD_S = 300
FENCED = re.compile(r"^ *```.*?^ *```[ \t]*$", re.MULTILINE | re.DOTALL)
FOLDER_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)[^)#\s]+/\)")
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
WORDS = re.compile(r"\[[^\]]*\]\([^)]*\)|(`+)(?P<quoted>.+?)\1|(?<![\w/])(?P<named>docs/\w+\.md)\b", re.DOTALL)
SHOWN_FILE = re.compile(r"(?:configs|examples|cluster|docs)/[\w./-]+\.\w+")
ITEM = re.compile(r"^- \[(.+?)\]\(([^)#]+)(?:#[^)]*)?\)", re.MULTILINE)
VERSION = re.compile(r"\d+(\.\d+)+")
COLOUR = re.compile(r"\x1b\[[\d;]*m")
API_ITEM = re.compile(r"^- \[`([\w.]+)`\]\(\S+\)(?:: .*)?$", re.MULTILINE)


class Site:
    """The pages of a site, which follow the links from docs/README.md. `root` is the repository."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.places: dict[str, str] = {}  # of each used file of the repository in the site
        self.pages: dict[str, str | bytes] = {}
        self.waiting: list[str] = []

    def place(self, path: str) -> str:
        """Return the place of a file of the repository in the site, and see to it that the file is there."""
        if path not in self.places:
            self.places[path] = self._new_place(path)
            self.waiting.append(path)
        return self.places[path]

    def _new_place(self, path: str) -> str:
        if path in NAMES:
            return NAMES[path]
        if path.startswith("docs/"):
            return path.removeprefix("docs/")
        if path.endswith(".ipynb"):
            return path.removesuffix(".ipynb") + ".md"
        if path.endswith((".md", *IMAGES)):
            return path.lower()
        return f"files/{path}.md"

    def collect(self) -> dict[str, str | bytes]:
        """Return the content of all files of the site by their places."""
        self.place("docs/README.md")
        for page in sorted((self.root / "docs").glob("*.md")):
            self.place(f"docs/{page.name}")
        while self.waiting:
            path = self.waiting.pop()
            self.pages[self.places[path]] = self._content(path)
        return self.pages

    def _content(self, path: str) -> str | bytes:
        file = self.root / path
        if path.endswith(IMAGES):
            return file.read_bytes()
        if path.endswith(".ipynb"):
            return self._notebook(path)
        text = file.read_text(encoding="utf-8")
        if not path.endswith(".md"):
            fence = "`" * (3 + text.count("```"))
            kind = KINDS.get(file.suffix, "")
            return f"# {file.name}\n\n`{path}` in the repository:\n\n{fence}{kind}\n{text}{fence}\n"
        if path == "docs/api.md":
            text = API_ITEM.sub(r"\n::: \1\n", text)
        return self._changed(text, path)

    def _changed(self, text: str, path: str) -> str:
        return as_python_markdown(outside_fences(text, lambda part: self._linked(part, path)))

    def _linked(self, text: str, path: str) -> str:
        """Return the text of a page with its links as they are in the site."""
        here = Path(self.places[path]).parent

        def link(target: str) -> str:
            return os.path.relpath(self.place(target), here)

        def relative(match: re.Match[str]) -> str:
            target = os.path.normpath(Path(path).parent / match[1])
            if not (self.root / target).is_file():
                raise UserError(f"{path}: the link {match[1]} leads to no file of the repository. Correct the link.")
            return link(target)

        def named(match: re.Match[str]) -> str:
            file = match["quoted"] or match["named"] or ""  # or a link, which stays
            is_shown = SHOWN_FILE.fullmatch(file) and (self.root / file).is_file()
            return f"[{match[0]}]({link(file)})" if is_shown else match[0]

        text = FOLDER_LINK.sub(r"\1", re.sub(r"\]\(\s+", "](", text))  # a folder is no page
        return WORDS.sub(named, LINK.sub(relative, text))

    def _notebook(self, path: str) -> str:
        """Return a notebook with its outputs as a page, and put its pictures next to the page."""
        import nbformat
        from nbconvert import MarkdownExporter

        place = Path(self.places[path])
        notebook = nbformat.read(self.root / path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = self._changed(cell.source, path)
        text, extra = MarkdownExporter().from_notebook_node(notebook)
        for name, content in extra["outputs"].items():
            self.pages[str(place.parent / f"{place.stem}_{name}")] = content
            text = text.replace(f"({name})", f"({place.stem}_{name})")
        return str(text)

    def navigation(self) -> list[dict[str, object]]:
        """Return the sections of docs/README.md, each with the titles and the places of its pages."""
        text = (self.root / "docs" / "README.md").read_text(encoding="utf-8")
        sections: list[dict[str, object]] = [{"Overview": "index.md"}]
        for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            title, _, items = section.partition("\n")
            entries = [(name, os.path.normpath(Path("docs") / target)) for name, target in ITEM.findall(items)]
            sections.append({title: [{name[0].upper() + name[1:]: self.place(path)} for name, path in entries]})
        return sections


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Return the text with a change in every part that is no fenced block."""
    parts, end = [], 0
    for match in FENCED.finditer(text):
        parts += [change(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(text[end:])])


def as_python_markdown(text: str) -> str:
    """Return a page for a reader that wants an empty line before a list, and four spaces for each level of a list."""
    lines: list[str] = []
    levels: list[int] = []  # where the text of each open item begins
    fence = ""
    for line in text.splitlines():
        space = len(line) - len(line.lstrip())
        item = re.match(r" *(?:[-*+]|\d+[.)])( +)(?=\S)", line) if not fence else None
        open_items = len(levels)
        if line.strip() and not fence:
            while levels and space < levels[-1]:
                levels.pop()
        inside = levels[-1] if levels else 0
        follows_text = bool(lines and lines[-1].strip()) and not re.match(r" *(?:[-*+]|\d+[.)]) |#", lines[-1])
        if item and follows_text and open_items == len(levels):
            if not re.match(r" *(?:[-*+]|1[.)]) ", line):  # a number in a sentence
                lines[-1] += f" {line.strip()}"
                continue
            lines.append("")
        moved = line[min(space, inside) :] if line.strip() else ""
        lines.append(" " * 4 * len(levels) + moved if moved else "")
        if item:
            levels.append(item.end())
        marker = re.match(r" *(`{3,})", line)
        if marker and not fence:
            fence = marker[1]
        elif fence and line.strip() == fence:
            fence = ""
    return "\n".join(lines) + "\n"


def build(folder: Path, *, version: str | None = None, root: Path = ROOT) -> Path:
    """Build the site in `folder`, with warnings as errors. Return the folder of the HTML files.

    `version` adds a selector of versions, which reads `../versions.json`. UserError names a broken link.
    """
    needed = {"zensical", "mkdocstrings_handlers"} | ({"nbconvert"} if any(root.glob("notebooks/*.ipynb")) else set())
    if missing := sorted(name for name in needed if find_spec(name) is None):
        raise UserError(f"The site needs {' and '.join(missing)}: install the extra `docs`, pip install -e '.[docs]'.")
    site = Site(root)
    navigation = site.navigation()
    shutil.rmtree(folder, ignore_errors=True)
    for place, content in site.collect().items():
        file = folder / "pages" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "pages" / "assets").mkdir(exist_ok=True)
    for name in ("iframe-worker.js", "site.css"):
        shutil.copy(HERE / name, folder / "pages" / "assets")
    settings = tomllib.loads((HERE / "zensical.toml").read_text(encoding="utf-8"))["project"]
    settings["nav"] = navigation
    settings["plugins"]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(root)]
    if version is not None:
        settings["extra"]["version"] = {"provider": "mike"}
    (folder / "zensical.toml").write_text(f"project = {as_toml(settings)}\n", encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=BUILD_S)
    if done.returncode:
        report = COLOUR.sub("", done.stderr).partition("Traceback")[0] or done.stderr
        raise UserError(f"The site has errors:\n{report}")
    (folder / "html" / "404.html").unlink()  # names its styles from the root of a host
    return folder / "html"


def as_toml(value: object) -> str:
    """Return lists, mappings and strings as an inline value of TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(key)} = {as_toml(item)}' for key, item in value.items())} }}"
    return json.dumps(value)


def release(html: Path, folder: Path, version: str) -> None:
    """Put a built site into FOLDER/VERSION. List all versions in mike's form, the newest first, for the selector."""
    shutil.rmtree(folder / version, ignore_errors=True)
    shutil.copytree(html, folder / version)
    names = [path.name for path in folder.iterdir() if VERSION.fullmatch(path.name)]
    names.sort(key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    listed = [{"version": name, "title": name, "aliases": ["latest"][: name == names[0]]} for name in names]
    (folder / "versions.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    forward = f'<!doctype html>\n<meta http-equiv="refresh" content="0; url={names[0]}/index.html">\n'
    (folder / "index.html").write_text(f"{forward}<title>ray-rlhf</title>\n", encoding="utf-8")


def main(arguments: Iterable[str] | None = None) -> int:
    """Build the site, and put it into the folder of releases if asked to."""
    parser = argparse.ArgumentParser(description="Build the site of the documentation.")
    parser.add_argument("--release", metavar="VERSION", help="also put the site into FOLDER/VERSION")
    parser.add_argument("--into", metavar="FOLDER", type=Path, help="the folder of all releases")
    args = parser.parse_args(None if arguments is None else list(arguments))
    if (args.release is None) != (args.into is None):
        parser.error("--release and --into go together")
    if args.release is not None and not VERSION.fullmatch(args.release):
        parser.error(f"--release {args.release}: a version is numbers with dots between them, such as 1.2.0")
    try:
        html = build(ROOT / "build" / "site", version=args.release)
        if args.release is not None:
            release(html, args.into, args.release)
            html = args.into
    except UserError as error:
        sys.stderr.write(f"build.py: error: {error}\n")
        return 2
    sys.stdout.write(f"{html / 'index.html'}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

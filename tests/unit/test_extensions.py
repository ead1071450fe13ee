"""Code is found by name in files and in entry points of packages. Every wrong name has a message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.extensions import CodeSource, LoadError, find_code, import_file, load_code
from rlhf.rewards.loading import load_reward
from tests.packages import install


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def refusal(name: str, *, folder: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        find_code("reward", name, built_ins=["contains"], folders=[folder] if folder else [], key="rewards.r.function")
    assert str(error.value).startswith("rewards.r.function: ")
    return str(error.value)


def test_an_entry_point_is_found_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "shop", rewards={"polite": "shop_code:polite"}, code="def polite(): return 3\n")
    source = find_code("reward", "polite", args={"a": 1}, key="k")
    assert source == CodeSource(path=None, name="polite", args={"a": 1}, entry="shop_code:polite", package="shop 1.0")
    assert load_code(source)() == 3


def test_an_unknown_or_ambiguous_name_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_code("reward", "contains", built_ins=["contains"], key="k").entry is None
    rewards = {"polite": "shop_code:x", "contains": "shop_code:x"}
    install(tmp_path, monkeypatch, "shop", rewards=rewards, environments={"elsewhere": "shop_code:y"})
    assert "the package shop 1.0 offers the reward `contains`, which is a built-in reward" in refusal("contains")
    message = refusal("polites")
    assert "there is no reward `polites`; did you mean `polite`? Built-in: contains. From packages: polite." in message
    assert "elsewhere" not in message
    install(tmp_path, monkeypatch, "market", rewards={"polite": "market_code:x"})
    assert "the packages market 1.0 and shop 1.0 all offer the reward `polite`" in refusal("polite")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import nowhere\n", "importing shop_code raised ModuleNotFoundError: No module named 'nowhere', at "),
        ("import sys\nsys.exit(3)\n", "importing shop_code raised SystemExit: 3"),
        ("def polit(): ...\n", "shop_code defines no `polite`; it defines: polit"),
    ],
)
def test_a_broken_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: str) -> None:
    install(tmp_path, monkeypatch, "shop", rewards={"polite": "shop_code:polite"}, code=code)
    with pytest.raises(LoadError) as error:
        load_code(find_code("reward", "polite", key="k"))
    assert str(error.value).startswith("the package shop 1.0 offers `polite` as shop_code:polite, but ")
    assert expected in str(error.value)


def test_a_reward_of_a_package_is_loaded_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def polite(prompt, response, answer): return 1.0\n"
    install(tmp_path, monkeypatch, "shop", rewards={"polite": "shop_code:polite"}, code=code)
    reward = load_reward("polite", args={}, folders=[], key="rewards.r.function")
    assert reward.signature.required == ("answer",)
    assert reward.score_of_killed is None
    (tmp_path / "shop_code.py").write_text("import nowhere\n")
    with pytest.raises(UserError, match=r"rewards\.r\.function: the package shop 1\.0 offers `polite`"):
        load_reward("polite", args={}, folders=[], key="rewards.r.function")


def test_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import near_it\ndef reward(): return near_it.VALUE\n")
    (tmp_path / "near_it.py").write_text("VALUE = 5\n")
    source = find_code("reward", "mine.py:reward", folders=[tmp_path], key="k")
    assert load_code(source)() == 5
    assert "names a file, but no reward in it. Write `mine.py:NAME`" in refusal("mine.py", folder=tmp_path)
    assert f"(looked for {tmp_path / 'absent.py'})" in refusal("absent.py:reward", folder=tmp_path)


def test_a_changed_file_is_imported_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    source = CodeSource(path=str(path), name="LIMIT")
    for text, value in (("LIMIT = 1\n", 1), ("LIMIT = 2\n", 2)):
        path.write_text(text)  # as long as the text before, and possibly within one tick of the file's clock
        assert load_code(source) == value
    assert import_file(str(path)) is import_file(str(path))


def test_neighbours_come_first_only_in_an_isolated_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for isolated, place in ((False, -1), (True, 0)):
        monkeypatch.setattr(sys, "path", ["/elsewhere"])
        (tmp_path / "mine.py").write_text(f"ISOLATED = {isolated}\n")
        import_file(str(tmp_path / "mine.py"), isolated=isolated)
        assert sys.path[place] == str(tmp_path)
        assert len(sys.path) == 2


def test_a_file_that_failed_fails_again(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1 / 0\n")
    source = find_code("reward", "broken.py:x", folders=[tmp_path], key="k")
    for _ in range(2):
        with pytest.raises(LoadError, match=r"ZeroDivisionError: division by zero, at .*broken\.py:1"):
            load_code(source)
    (tmp_path / "broken.py").write_text("from rlhf.extensions import import_file\nimport_file(__file__)\n")
    with pytest.raises(
        LoadError, match=r"broken.py loads a configuration that names .*broken.py itself. Put this call"
    ):
        load_code(source)


UNGUARDED = "import rlhf\n\n\ndef f(prompt, response): return 1.0\n\n\nrlhf.plan('run.yaml')\n"


def test_code_that_starts_work_when_it_is_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "script.py"
    path.write_text(UNGUARDED)
    words = rf'^{path}:7: rlhf.plan is called while the file is imported. .* `if __name__ == "__main__":`.$'
    with pytest.raises(LoadError, match=words):
        load_code(CodeSource(path=str(path), name="f"))
    with pytest.raises(UserError, match=rf"^rewards.r.function: {words[1:]}"):
        load_reward("script.py:f", args={}, folders=[tmp_path], key="rewards.r.function")
    path.write_text(UNGUARDED.replace("rlhf.plan", "if __name__ == '__main__': rlhf.plan"))
    load_reward("script.py:f", args={}, folders=[tmp_path], key="rewards.r.function")
    install(tmp_path, monkeypatch, "shop", rewards={"polite": "shop_code:f"}, code=UNGUARDED)
    with pytest.raises(LoadError, match=rf"^{tmp_path}/shop_code.py:7: rlhf.plan is called while the file"):
        load_code(find_code("reward", "polite", key="k"))


def test_loaded_code_starts_no_work(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import rlhf\n\n\ndef f(prompt, response): return rlhf.plan('run.yaml')\n")
    words = f"{tmp_path}/mine.py:4: rlhf.plan is called by code that a configuration names. "
    with pytest.raises(LoadError, match=words):
        load_code(CodeSource(path=str(tmp_path / "mine.py"), name="f"))("", "")


def test_a_digest_covers_the_source_and_its_text(tmp_path: Path) -> None:
    path, moved = tmp_path / "mine.py", tmp_path / "moved.py"
    source = CodeSource(path=str(path), name="a")
    for file in (path, moved):
        file.write_text("a = 1\n")
    first = source.digest()
    assert source.digest() == CodeSource(path=str(moved), name="a").digest() == first
    path.write_text("a = 2\n")
    assert source.digest() != first
    offer = {"path": None, "name": "a", "entry": "shop_code:a"}
    assert CodeSource(**offer, package="shop 1.0").digest() != CodeSource(**offer, package="shop 1.1").digest()

"""The documentation says what is so: what can rot is generated, or compared here."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main
import yaml

import dispatcher
from dispatcher.cli import app
from dispatcher.config import load_config
from dispatcher.settings import Settings

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES: Final = [str(page.relative_to(ROOT)) for page in PAGES]
UNLISTED: Final = frozenset({"DISPATCHER_HOME", "DISPATCHER_SIM_EXAMPLES"})
"""Variables that are no settings: where a standalone is looked for, and what only tests read."""


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        found = re.findall(
            rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
        )
        yield from ((str(page.relative_to(ROOT)), block) for block in found)


def anchors(page: Path) -> set[str]:
    """The places in a page that a link can name, as GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands() -> Iterator[tuple[str, Any]]:
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]  # the app is a group
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", one) for inner, one in command.commands.items())
        else:
            yield name, command


def test_the_generated_parts_are_as_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate_docs.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)  # three programs that import everything, one after the other
def test_a_part_that_differs_is_named_and_made_anew(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "docs").mkdir()
    script = tmp_path / "scripts" / "generate_docs.py"
    script.write_text((ROOT / "scripts" / "generate_docs.py").read_text())
    names = re.findall(r"<!-- generated: ([\w-]+) -->", "".join(p.read_text() for p in PAGES))
    page = tmp_path / "docs" / "all.md"
    page.write_text(
        "".join(f"# {n}\n<!-- generated: {n} -->\nold\n<!-- end: {n} -->\n" for n in names)
    )

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), *options], capture_output=True, text=True, check=False
        )

    before = page.read_text()
    refused = run("--check")
    assert (refused.returncode, page.read_text()) == (1, before)
    assert "docs/all.md" in refused.stdout
    assert run().returncode == 0
    assert "\nold\n" not in page.read_text()
    assert page.read_text().startswith(f"# {names[0]}\n<!-- generated: {names[0]} -->\n\n")
    assert run("--check").returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(there), f"{name} links to {target}; there is no such heading"


@pytest.mark.parametrize("name", NAMES)
def test_every_test_that_is_named_exists(name: str) -> None:
    for path, inner in re.findall(r"(tests/[\w/]+\.py)::([\w:]+)", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), f"{name} names {path}, which does not exist"
        assert has_test(ROOT / path, inner), f"{name} names {path}::{inner}, which does not exist"


def has_test(path: Path, name: str) -> bool:
    """Whether a file has a test function, or a class that has it or inherits it from the kit."""
    scope: list[ast.stmt] = ast.parse(path.read_text()).body
    *classes, function = name.split("::")
    for wanted in classes:
        (found,) = [one for one in scope if isinstance(one, ast.ClassDef) and one.name == wanted]
        scope = list(found.body)
        if any(ast.unparse(base) == "BackendContract" for base in found.bases):
            kit = ast.parse((ROOT / "dispatcher" / "testing.py").read_text()).body
            scope += next(
                one.body
                for one in kit
                if isinstance(one, ast.ClassDef) and one.name == "BackendContract"
            )
    return any(isinstance(one, ast.FunctionDef) and one.name == function for one in scope)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_make_target_that_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    known = {command for command, _ in commands()} | {"db", "emulate"}
    for words in re.findall(r"`dispatcher ((?:db )?[a-z]+)", text):
        assert words in known, f"{name} names the command dispatcher {words}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"{name} names make {target}"


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_is_named_exists(name: str) -> None:
    known = {f"DISPATCHER_{field.upper()}" for field in Settings.model_fields} | UNLISTED
    assert set(re.findall(r"\bDISPATCHER_[A-Z_]+[A-Z]\b", (ROOT / name).read_text())) <= known


def test_extras_are_named_as_installers_spell_them_and_never_of_an_index() -> None:
    """Of an older pip `.[cloud_run]` installs nothing, and says so in a warning only."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(declared["optional-dependencies"])
    assert extras == set(metadata("dispatcher").get_all("Provides-Extra") or ())
    sources = [*PAGES, *(ROOT / "examples").rglob("*.md"), *(ROOT / "dispatcher").rglob("*.py")]
    said = {path: path.read_text() for path in sources}
    named = {
        extra
        for text in said.values()
        for words in re.findall(r"'\.\[([\w,-]+)\]'|extra `([\w-]+)`", text)
        for extra in "".join(words).split(",")
    }
    assert named == extras
    # Until it is published, a project of that name on an index is a stranger's.
    assert [str(p) for p, text in said.items() if re.search(r"dispatcher\[[a-z{]", text)] == []


def test_every_block_of_python_parses() -> None:
    found = list(blocks("python"))
    assert "README.md" in {name for name, _ in found}
    for name, block in found:
        compile(block, name, "exec")


def test_every_jobs_file_that_is_shown_can_be_loaded(tmp_path: Path) -> None:
    found = list(blocks("yaml"))
    assert {"README.md", "docs/jobs.md"} <= {name for name, _ in found}
    for _, block in found:
        assert yaml.safe_load(block).keys() - {"schedules"} == {"targets", "jobs"}
        path = tmp_path / "jobs.yaml"
        path.write_text(block)
        load_config(str(path))


def test_the_module_of_jobs_that_is_shown_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shown,) = [block for name, block in blocks("python") if name == "docs/jobs.md"]
    (tmp_path / "jobs_that_are_shown.py").write_text(shown)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_config("jobs_that_are_shown").jobs["invoices"].retry.exit_codes == {65: "fail"}


def test_the_public_names_are_those_that_exist_and_each_is_described() -> None:
    assert sorted(dispatcher.__all__) == sorted(dispatcher._HOMES)
    assert len(set(dispatcher.__all__)) == len(dispatcher.__all__)
    for name in dispatcher.__all__:
        value = getattr(dispatcher, name)
        assert value.__name__ == name
        assert inspect.getdoc(value), f"{name} has no docstring"
        if inspect.isclass(value):
            for verb, function in vars(value).items():
                if inspect.isfunction(function) and not verb.startswith("_"):
                    assert function.__doc__, f"{name}.{verb} has no docstring"


def test_every_command_has_help_and_each_of_its_options_too() -> None:
    for name, command in commands():
        assert command.help, f"dispatcher {name} has no help"
        for param in command.params:
            assert param.help, f"dispatcher {name}: {param.name} has no help"


def test_every_decision_is_listed_and_dated() -> None:
    folder = ROOT / "docs" / "adr"
    index = (folder / "README.md").read_text()
    for page in sorted(folder.glob("0*.md")):
        title, _, rest = page.read_text().removeprefix("# ").partition("\n")
        number, _, words = title.partition(". ")
        assert f"{number}. [{words}]({page.name})" in index
        assert re.match(r"\nDate: \d{4}-\d\d-\d\d\. Status: ", rest)

"""Writes the parts of the documentation that are made from code: `make docs`, or with `--check`.

A part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->` in any Markdown file of
the project; what is around it is written by people. `--check` changes nothing and ends with 1 if a
part is not as the code says, which is what `tests/unit/test_docs.py` asks.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

import sqlalchemy as sa
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dispatcher import errors, schema
from dispatcher.backends.cloud_run import CloudRunOptions, CloudRunSettings
from dispatcher.backends.cloud_run.options import DefinitionBlock, VpcBlock
from dispatcher.backends.local import LocalOptions, LocalSettings
from dispatcher.cli import app
from dispatcher.client import Dispatcher
from dispatcher.config import Target
from dispatcher.durations import format_duration
from dispatcher.emulators.cloud_run.guesses import GUESSES
from dispatcher.errors import DispatcherError, InvalidInput, Unreachable
from dispatcher.job import Chunking, ItemSource, Job, Limits, Overrides, RetryPolicy, SuccessPolicy
from dispatcher.schedule import Schedule
from dispatcher.settings import Settings
from dispatcher.states import (
    BATCH_EDGES,
    CHUNK_EDGES,
    EXECUTION_EDGES,
    FINAL_BATCH,
    FINAL_CHUNK,
    BatchState,
    CancelKind,
    ChunkState,
    Edge,
    ExecutionState,
    Outcome,
)

ROOT: Final = Path(__file__).resolve().parent.parent
PART: Final = re.compile(
    r"<!-- generated: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end: (?P=name) -->", re.DOTALL
)

COMMON: Final = frozenset({"as_json", "debug", "database_url", "jobs"})
"""Options that every command has; they are told once."""

UNSAID: Final[Mapping[str, str]] = {
    "Settings.log_level": "The least level that is logged.",
    "Settings.log_format": "For people on a terminal, or a JSON object a line.",
    "Settings.sweep_interval": "How often each worker sweeps.",
    "Target.max_executions": "Live executions at once, over all jobs.",
    "Target.launches_per_minute": "Launch calls, shared by all workers; shrinks on throttling.",
    "ItemSource.timeout": "The longest that it may take, from its start to its last item.",
    "RetryPolicy.initial": "The wait after the first failure of a class.",
    "RetryPolicy.factor": "By how much each further wait grows.",
    "RetryPolicy.max": "The longest wait.",
    "SuccessPolicy.max_failed_chunks": "Chunks that may fail or be cancelled.",
    "SuccessPolicy.max_failed_items": "Items that may fail.",
    "Job.name": "The key in the file: a lower-case letter, then letters, digits and `-`, ≤ 40.",
    "Job.target": "A configured target.",
    "Job.description": "For people.",
    "Job.chunk": "How items become chunks, see below.",
    "Job.retry": "When a chunk is tried again, see below.",
    "Job.limits": "How much of it may run at once, see below.",
    "Job.overrides": "What a single batch may set over the job, see below.",
    "Job.success": "When a batch has succeeded, see below.",
    "Job.labels": "Kept with each batch; `enqueue` may add some.",
    "Target.name": "The key in the file, as a job's.",
    "Schedule.name": "The key in the file, as a job's.",
    "Schedule.job": "A configured job.",
    "Schedule.params": "Checked against the job's schema.",
}
"""What the code leaves unsaid because the name says it, in words for the tables."""


# --- Markdown -------------------------------------------------------------------------------------


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def words(text: str) -> str:
    """Put a docstring on one line, as a sentence."""
    line = literal(" ".join(text.split()))
    if not re.match(r"(true|false|none)\b", line):
        line = line[:1].upper() + line[1:]
    return line if not line or line.endswith((".", "…")) else f"{line}."


def literal(text: str) -> str:
    """Keep Markdown from reading a star outside of code as emphasis."""
    parts = text.split("`")
    parts[::2] = [part.replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)


def code(value: object) -> str:
    """Write a value as code."""
    return f"`{value}`"


# --- states ---------------------------------------------------------------------------------------


@cache
def attribute_docs(cls: type) -> Mapping[str, str]:
    """Read the text below each attribute of a class, which Python itself does not keep."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    if not isinstance(body, ast.ClassDef):
        raise TypeError(cls)
    found: dict[str, str] = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            target = before.target if isinstance(before, ast.AnnAssign) else None
            if isinstance(before, ast.Assign):
                target = before.targets[0]  # type: ignore[assignment]  # the first name is enough
            if isinstance(target, ast.Name):
                found[target.id] = inspect.cleandoc(str(after.value.value))
    return found


def glossary(*enums: type[StrEnum]) -> Iterator[str]:
    """Say what each member means."""
    for enum in enums:
        docs = attribute_docs(enum)
        yield f"**{enum.__name__}.** {words(inspect.getdoc(enum) or '')}"
        yield ""
        yield from table(
            ("word", "meaning"), ((code(one.value), words(docs[one.name])) for one in enum)
        )
        yield ""


def lifecycle(edges: Sequence[Edge[Any]], final: frozenset[Any]) -> Iterator[str]:
    """Draw a diagram and list its edges."""
    yield "```mermaid"
    yield "stateDiagram-v2"
    for edge in edges:
        # A label of Mermaid ends at a second colon.
        label = edge.verb.replace(":", ",")
        yield f"    {edge.old or '[*]'} --> {edge.new}: {label}"
    yield from (f"    {state} --> [*]" for state in sorted(final))
    yield "```"
    yield ""
    yield from table(
        ("from", "to", "by"),
        ((code(edge.old) if edge.old else "", code(edge.new), edge.verb) for edge in edges),
    )


# --- models ---------------------------------------------------------------------------------------


def described(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    """Say what a field means, from the code or from `UNSAID`; never from both."""
    said = field.description or attribute_docs(model).get(name)
    unsaid = UNSAID.get(f"{model.__name__}.{name}")
    if (said is None) == (unsaid is None):
        raise SystemExit(
            f"{model.__name__}.{name} is described {'nowhere' if said is None else 'twice'}: "
            "in the code, or in UNSAID of scripts/generate_docs.py"
        )
    return words(said or unsaid or "")


def kind(annotation: Any, marks: Sequence[Any]) -> str:
    """Say what values a field takes; marks are its bounds, from wherever they are annotated."""
    origin = get_origin(annotation)
    if hasattr(annotation, "__metadata__"):
        inner, *more = get_args(annotation)
        said = kind(inner, [*marks, *more])
    elif origin in (Union, UnionType):
        options = [one for one in get_args(annotation) if one is not type(None)]
        said = " or ".join(kind(one, marks) for one in options)
    elif origin is Literal:
        said = ", ".join(map(code, get_args(annotation)))
    elif origin is tuple:
        said = "list of texts"
    elif origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        said = "mapping"
    else:
        said = KINDS[annotation] + bounds(marks)
    return said


KINDS: Final[Mapping[Any, str]] = {
    str: "text",
    Path: "path",
    bool: "`true`, `false`",
    timedelta: "duration",
    int: "whole number",
    float: "number",
}


def bounds(marks: Sequence[Any]) -> str:
    """Say between what a number must lie."""
    found: dict[str, Any] = {}
    for mark in marks:
        for one in mark.metadata if isinstance(mark, FieldInfo) else [mark]:
            for name in ("ge", "gt", "le"):
                if getattr(one, name, None) is not None:
                    found[name] = getattr(one, name)
    if "ge" in found and "le" in found:
        return f", {found['ge']} to {found['le']}"
    return "".join(
        f", {sign} {found[name]}" for name, sign in (("ge", "≥"), ("gt", ">")) if name in found
    )


def default(field: FieldInfo) -> str:
    """Write a field's default as a file would."""
    value = {} if field.default_factory is dict else field.default
    if field.is_required():
        return "required"
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", exclude_unset=True)
        inner = ", ".join(f"{key}: {one}" for key, one in given.items())
        return code(f"{{{inner}}}") if inner else "its defaults"
    if isinstance(value, timedelta):
        return code(format_duration(value))
    if isinstance(value, str | Path):
        return code(value)
    return code(json.dumps(value))


def fields(model: type[BaseModel], title: str = "key") -> Iterator[str]:
    """List the fields of a model."""
    yield from table(
        (title, "value", "default", "what"),
        (
            (
                code(name),
                kind(field.annotation, field.metadata),
                default(field),
                described(model, name, field),
            )
            for name, field in model.model_fields.items()
            if not (model is Target and name == "settings")
        ),
    )


def job_file() -> Iterator[str]:
    """List everything that the jobs file may say."""
    yield from sections(
        ("A target: `targets.NAME`", Target),
        ("A target of the local backend may also set", LocalSettings),
        ("A job: `jobs.NAME`", Job),
        ("`items` of a job", ItemSource),
        ("`chunk` of a job", Chunking),
        ("`retry` of a job", RetryPolicy),
        ("`limits` of a job", Limits),
        ("`success` of a job", SuccessPolicy),
        ("`overrides` of a job", Overrides),
        ("`options` of a job on the local backend", LocalOptions),
        ("A schedule: `schedules.NAME`", Schedule),
    )


def cloud_run() -> Iterator[str]:
    """List what the jobs file may say of Cloud Run."""
    yield from sections(
        ("A target of the `cloud_run` backend may also set", CloudRunSettings),
        ("`options` of a job", CloudRunOptions),
        ("`options.definition`", DefinitionBlock),
        ("`options.definition.vpc`", VpcBlock),
    )


def guesses() -> Iterator[str]:
    """List what the emulator of Cloud Run assumes."""
    yield from table(
        ("what", "guess"), ((code(name), literal(said)) for name, said in GUESSES.items())
    )


def sections(*parts: tuple[str, type[BaseModel]]) -> Iterator[str]:
    """List the fields of some models, each under its title."""
    for title, model in parts:
        yield f"### {title}"
        yield ""
        yield from fields(model)
        yield ""


def settings() -> Iterator[str]:
    """List the settings by their variables."""
    yield from table(
        ("variable", "value", "default", "what"),
        (
            (
                code(f"DISPATCHER_{name.upper()}"),
                kind(field.annotation, field.metadata),
                "`user@host`" if name == "actor" else default(field),
                described(Settings, name, field),
            )
            for name, field in Settings.model_fields.items()
        ),
    )


# --- Python, errors and tables --------------------------------------------------------------------


def python_api() -> Iterator[str]:
    """List the verbs of `Dispatcher`."""
    rows = []
    for name, verb in vars(Dispatcher).items():
        if inspect.isfunction(verb) and not name.startswith("_"):
            said = (inspect.getdoc(verb) or "").partition("\n")[0]
            rows.append((code(f"{name}({_parameters(verb)})"), literal(said)))
    yield from table(("method", "does"), rows)


def _parameters(function: Callable[..., Any]) -> str:
    empty = inspect.Parameter.empty
    _, *own = inspect.signature(function).parameters.values()
    bare = [one.replace(annotation=empty) for one in own]
    return str(inspect.Signature(bare)).removeprefix("(").removesuffix(")")


def error_tree() -> Iterator[str]:
    """Draw the tree of errors with the exit code that each has on the command line."""
    yield "```text"
    yield from _branch(DispatcherError, 0)
    yield "```"


def _branch(error: type[DispatcherError], depth: int) -> Iterator[str]:
    exit_code = 2 if issubclass(error, InvalidInput) else 4 if issubclass(error, Unreachable) else 1
    name = f"{'  ' * depth}{error.__name__}"
    says = (inspect.getdoc(error) or "").partition("\n")[0]
    yield f"{name:<26} exit {exit_code}  {says}"
    for child in error.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _branch(child, depth + 1)


def tables() -> Iterator[str]:
    """List the tables and their columns."""
    dialect = sa.create_engine("postgresql+psycopg://").dialect
    for one in schema.metadata.sorted_tables:
        yield f"**`{one.schema}.{one.name}`**" + (f": {one.comment}" if one.comment else "")
        yield ""
        yield from table(
            ("column", "type", "null", "what"),
            (
                (
                    f"**{column.name}**" if column.primary_key else column.name,
                    column.type.compile(dialect=dialect).lower(),
                    "yes" if column.nullable else "",
                    column.comment or _points_to(column),
                )
                for column in one.columns
            ),
        )
        yield ""


def _points_to(column: sa.Column[Any]) -> str:
    return ", ".join(f"→ {key.target_fullname}" for key in column.foreign_keys)


# --- the command line -----------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, Any]]:
    """Yield each command of the CLI with its full name."""
    for name, one in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]  # the app is a group
        if hasattr(one, "commands"):
            yield from ((f"{name} {inner}", two) for inner, two in one.commands.items())
        else:
            yield name, one


def arguments(command: Any) -> list[str]:
    """Write the arguments of a command as its usage does."""
    return [
        param.metavar if param.required else f"[{param.metavar}]"
        for param in command.params
        if param.param_type_name == "argument"
    ]


def cli_table() -> Iterator[str]:
    """List the commands, a line each."""
    yield from table(
        ("command", "does"),
        (
            (code(" ".join(["dispatcher", name, *arguments(command)])), _first_line(command))
            for name, command in commands()
        ),
    )


def cli_help() -> Iterator[str]:
    """Tell each command: usage, options, and the shape of its JSON."""
    yield "Every command takes these, before or after its name:"
    yield ""
    yield from _options(next(iter(dict(commands()).values())), common=True)
    yield ""
    for name, command in commands():
        yield f"### dispatcher {name}"
        yield ""
        yield "```text"
        has_own = any(
            param.param_type_name == "option" and param.name not in COMMON
            for param in command.params
        )
        options = ["[OPTIONS]"] if has_own else []
        yield " ".join(["dispatcher", name, *options, *arguments(command)])
        yield "```"
        yield ""
        text, shape = _split_help(inspect.cleandoc(command.help))
        yield text
        yield ""
        if has_own:
            yield from _options(command, common=False)
            yield ""
        if shape:
            yield "With `--json`:"
            yield ""
            yield "```text"
            yield shape
            yield "```"
            yield ""


def _first_line(command: Any) -> str:
    return str(inspect.cleandoc(command.help).partition("\n")[0])


def _split_help(text: str) -> tuple[str, str]:
    """Part a help text from what it says of its JSON."""
    before, found, after = re.split(r"(With\s+--json:)\s*", text, maxsplit=1)
    shape, _, rest = after.partition("\n\n")
    return f"{before.rstrip()}\n\n{rest}".strip() if found else text, shape.strip()


def _options(command: Any, *, common: bool) -> Iterator[str]:
    rows = []
    for param in command.params:
        if param.param_type_name != "option" or (param.name in COMMON) is not common:
            continue
        spelled = " / ".join(code(one) for one in (*param.opts, *param.secondary_opts))
        name = f"{spelled} {param.metavar or ''}".strip()
        rows.append((name, _default_of(param), literal(param.help)))
    yield from table(("option", "default", "what"), rows)


def _default_of(param: Any) -> str:
    if isinstance(param.show_default, str):
        return param.show_default
    value = param.default
    if isinstance(value, bool):
        return code(param.opts[0]) if value and param.secondary_opts else ""
    return "" if value in (None, "", [], ()) else code(value)


# --- put together ---------------------------------------------------------------------------------

PARTS: Final[Mapping[str, Callable[[], Iterable[str]]]] = {
    "cli-table": cli_table,
    "cli-help": cli_help,
    "batch-lifecycle": lambda: lifecycle(BATCH_EDGES, FINAL_BATCH),
    "chunk-lifecycle": lambda: lifecycle(CHUNK_EDGES, FINAL_CHUNK),
    "execution-lifecycle": lambda: lifecycle(EXECUTION_EDGES, frozenset({ExecutionState.ENDED})),
    "states": lambda: glossary(BatchState, ChunkState, ExecutionState),
    "outcomes": lambda: glossary(Outcome, CancelKind),
    "settings": settings,
    "job-file": job_file,
    "cloud-run": cloud_run,
    "cloud-run-guesses": guesses,
    "python-api": python_api,
    "errors": error_tree,
    "tables": tables,
}


def pages() -> Iterator[Path]:
    """Yield the Markdown files of the project."""
    yield from sorted(ROOT.glob("*.md"))
    yield from sorted((ROOT / "docs").rglob("*.md"))


def renewed(text: str) -> str:
    """Give a page with its generated parts made anew."""

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in PARTS:
            raise SystemExit(f"no part is called {name}; there are: {', '.join(PARTS)}")
        body = "\n".join(PARTS[name]()).strip()
        return f"<!-- generated: {name} -->\n\n{body}\n\n<!-- end: {name} -->"

    return PART.sub(part, text)


def main() -> int:
    """Write the parts, or say which are not as the code says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if it differs")
    is_check = parser.parse_args().check
    stale = []
    placed: set[str] = set()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        placed.update(match["name"] for match in PART.finditer(text))
        new = renewed(text)
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if not is_check:
                page.write_text(new, encoding="utf-8")
    stale += [f"the part {name}, which stands in no page" for name in sorted(PARTS.keys() - placed)]
    if stale:
        print(f"{'not as the code says' if is_check else 'written'}: {', '.join(stale)}")
    if is_check and stale:
        print("run `make docs`")
    return 1 if is_check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

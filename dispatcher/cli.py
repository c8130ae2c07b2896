"""The command line: the verbs of `Dispatcher` for people, and what it takes to operate one.

Commands, options, help texts and exit codes are here; what a command does is `commands.py`'s, which
is imported only when a command runs, so that `--help` answers at once.

Exit codes: 0 done or succeeded, 1 failed, 2 bad usage or input, 3 the batch was cancelled, 4 a
server cannot be reached, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from importlib.metadata import version
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec, get_type_hints

import typer

from dispatcher.emulators import command as emulators
from dispatcher.errors import DispatcherError, InvalidInput, Unreachable

if TYPE_CHECKING:
    from dispatcher import commands
else:

    class _Commands:
        """Stands for `dispatcher.commands` until one of its functions is wanted."""

        def __getattr__(self, name: str) -> object:
            return getattr(import_module("dispatcher.commands"), name)

    commands = _Commands()

__all__ = ["Scope", "app", "main"]

INTERNAL: Final = 1
BAD_INPUT: Final = 2
UNREACHABLE: Final = 4
INTERRUPTED: Final = 130

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What the system answers who writes where there is no room, or a broken device."""

EPILOG: Final = """
Exit codes: 0 done or succeeded, 1 failed, 2 bad usage or input, 3 the batch was cancelled, 4 a
server cannot be reached, 130 interrupted with ^C.

Settings come from DISPATCHER_DATABASE_URL, DISPATCHER_BROKER_URL, DISPATCHER_JOBS and the like, or
from a `dispatcher standalone` that runs in this directory. A batch id may be shortened as long as
it stays unambiguous; a chunk is BATCH/CHUNK. Times are UTC.
"""


@dataclass(frozen=True, slots=True)
class Scope:
    """What every command can be told, before or after its name."""

    as_json: bool = False
    debug: bool = False
    database_url: str | None = None
    jobs: str | None = None


Json = Annotated[
    bool, typer.Option("--json", help="Print JSON, in the shape said here.", show_default=False)
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error, and log.", show_default=False),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database-url", metavar="URL", help="Over DISPATCHER_DATABASE_URL."),
]
Jobs = Annotated[
    str | None,
    typer.Option("--jobs", metavar="FILE", help="Over DISPATCHER_JOBS: a YAML file or a module."),
]

app = typer.Typer(
    name="dispatcher",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
db = typer.Typer(
    name="db",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Bring the tables in Postgres to another revision.",
)

P = ParamSpec("P")


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"dispatcher {version('dispatcher')}\n")
        raise typer.Exit


@app.callback()
def everywhere(
    context: typer.Context,
    as_json: Json = False,
    debug: Debug = False,
    database_url: DatabaseUrl = None,
    jobs: Jobs = None,
    show_version: Annotated[  # noqa: ARG001 - its callback has told and ended
        bool,
        typer.Option(
            "--version",
            help="Print the version and end.",
            callback=_show_version,
            is_eager=True,
            show_default=False,
        ),
    ] = False,
) -> None:
    """Run jobs over lists of items, in containers or processes elsewhere, and follow them."""
    context.obj = Scope(as_json, debug, database_url, jobs)


def command(
    group: typer.Typer, name: str
) -> Callable[[Callable[Concatenate[Scope, P], int]], Callable[Concatenate[Scope, P], int]]:
    """Make a command of a function of a `Scope`, which returns the exit code.

    The command gets the options that all have, and whatever goes wrong in it becomes a message and
    an exit code.
    """

    def register(
        body: Callable[Concatenate[Scope, P], int],
    ) -> Callable[Concatenate[Scope, P], int]:
        @wraps(body)
        def run(context: typer.Context, **given: Any) -> None:
            outer = context.obj if isinstance(context.obj, Scope) else Scope()
            scope = Scope(
                given.pop("as_json") or outer.as_json,
                given.pop("debug") or outer.debug,
                given.pop("database_url") or outer.database_url,
                given.pop("jobs") or outer.jobs,
            )
            raise typer.Exit(guarded(scope, lambda: body(scope, **given)))  # type: ignore[call-arg]  # typer fills P from the signature below

        own = [
            parameter.replace(annotation=annotation)
            for (_, parameter), annotation in zip(
                list(signature(body).parameters.items())[1:],
                list(get_type_hints(body, include_extras=True).values())[1:-1],
                strict=True,
            )
        ]
        kind = Parameter.KEYWORD_ONLY
        common = [
            Parameter("as_json", kind, default=False, annotation=Json),
            Parameter("debug", kind, default=False, annotation=Debug),
            Parameter("database_url", kind, default=None, annotation=DatabaseUrl),
            Parameter("jobs", kind, default=None, annotation=Jobs),
        ]
        context = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        own = [parameter.replace(kind=kind) for parameter in own]
        parameters = [context, *own, *common]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        group.command(name)(run)
        return body

    return register


def guarded(scope: Scope, body: Callable[[], int]) -> int:
    """Run a command; turn whatever goes wrong into a message on stderr and an exit code."""
    try:
        code = body()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has gone, as `head` does: nobody is left to tell anything to.
        _discard_output()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except DispatcherError as error:
        _complain(scope, f"error: {error}")
        if isinstance(error, InvalidInput):
            return BAD_INPUT
        return UNREACHABLE if isinstance(error, Unreachable) else INTERNAL
    except Exception as error:  # noqa: BLE001 - no traceback ever reaches a user
        return _internal(scope, error)
    return code


def _internal(scope: Scope, error: Exception) -> int:
    """Tell of an error that nobody raised for a user."""
    if _is_of_output(error):
        return _tell_of_output(error)
    said = str(error).strip().partition("\n")[0]
    kind = type(error).__name__
    hint = "" if scope.debug else " (run again with --debug)"
    _complain(scope, f"internal error: {kind}{': ' if said else ''}{said}{hint}")
    return INTERNAL


def _is_of_output(error: Exception) -> bool:
    """Whether an error says that what was printed cannot be written, as on a full disk."""
    return isinstance(error, OSError) and error.errno in FULL and error.filename is None


def _tell_of_output(error: Exception) -> int:
    _discard_output()
    said = error.strerror if isinstance(error, OSError) else error
    sys.stderr.write(f"error: the output cannot be written: {said}\n")
    return INTERNAL


def _discard_output() -> None:
    """Let what is still to be written go nowhere, so that the end of the process can flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(scope: Scope, text: str) -> None:
    sys.stdout.flush()
    if scope.debug:
        traceback.print_exc()
    sys.stderr.write(f"{text}\n")


# --- work -----------------------------------------------------------------------------------------

BatchId = Annotated[
    str, typer.Argument(metavar="BATCH", help="The batch; its id may be shortened.")
]


@command(app, "enqueue")
def enqueue(
    scope: Scope,
    job: Annotated[str, typer.Argument(metavar="JOB", help="The name of a configured job.")],
    *,
    items: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A .jsonl, .csv or .txt file (.gz may follow), a file://, s3:// or gs:// URI, or "
            "- for JSON lines from standard input.",
        ),
    ] = None,
    item: Annotated[
        list[str],
        typer.Option(
            metavar="VALUE",
            help="An item; may be repeated. It is read as JSON if it is JSON (7, true, "
            "'{\"id\": 7}'), else as text (abc, 007); the text 7 is written '\"7\"'.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    param: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=VALUE",
            help="A param; may be repeated. Read as the job's schema types it: a string stays as "
            "it is; without a type, as --item.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Idempotency key: the same key and request give the same batch, however often.",
        ),
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option(min=-100, max=100, metavar="N", help="Over the job's; higher goes first."),
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Items a chunk, over the job's own chunking."),
    ] = None,
    arg: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="An argument, in place of all of the job's, if its `overrides` let a batch bring "
            "some; may be repeated. One that begins with a dash is written --arg=--name.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    env: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=VALUE",
            help="A variable, over the job's, if its `overrides` name it; may be repeated.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="The longest that one task may run, such as 30m, up to what the job's "
            "`overrides` say.",
        ),
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Chunks to cut the items into, up to what the job's `overrides` say.",
        ),
    ] = None,
    label: Annotated[
        list[str], typer.Option(metavar="NAME=VALUE", help="A label; may be repeated.")
    ] = [],  # noqa: B006 - typer copies it
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Follow the batch; exit with 0, 1 or 3 as it ends."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print how it would be cut and launched; write nothing."),
    ] = False,
) -> int:
    """Enqueue a batch: run a job over items; print the batch's id.

    Without --items and --item the job's own item source is asked when the batch is planned; with
    --dry-run it is asked now, here.

    With --json: the batch, as `batches` shows it; with --wait as it ended. With --dry-run:
    {job, target, params, items, chunks, items_per_chunk: {min, max}, weight_per_chunk: {min, max},
    largest_chunk_bytes, executions, exact (false: at least so many, as limits let not all run at
    once), tasks_per_execution: {min, max}, parallelism, tasks_at_once, launch_calls,
    launch_calls_seconds, limits: {max_running, max_executions, launches_per_minute, running,
    per_batch}}.
    """
    return commands.enqueue(
        scope,
        job,
        items=items,
        item=item,
        param=param,
        key=key,
        priority=priority,
        chunk_size=chunk_size,
        arg=arg,
        env=env,
        timeout=timeout,
        tasks=tasks,
        label=label,
        wait=wait,
        dry_run=dry_run,
    )


@command(app, "batches")
def batches(
    scope: Scope,
    *,
    job: Annotated[str | None, typer.Option(metavar="JOB", help="Only of this job.")] = None,
    state: Annotated[
        str | None,
        typer.Option(
            metavar="STATE",
            help="Only in this state: planning, running, succeeded, failed, cancelled.",
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only enqueued since: 2025-11-20T06:00, 90m, 2d."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="NAME=VALUE", help="Only with this label.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many.")] = 20,
) -> int:
    """List batches, newest first.

    With --json: a list of batches {id, key, job, target, state, reason, params, labels, priority,
    actor, created_at, planned_at, deadline, cancel_requested_at, finished_at, items, chunks_total,
    counts: {pending, launching, running, succeeded, failed, cancelled, split}, progress (0 to
    1)}.
    """
    return commands.batches(scope, job=job, state=state, since=since, label=label, limit=limit)


@command(app, "show")
def show(
    scope: Scope,
    batch: BatchId,
    *,
    items: Annotated[
        bool, typer.Option("--items", help="With each item and how it ended.")
    ] = False,
    failed: Annotated[
        bool,
        typer.Option("--failed", help="Only chunks that failed or whose last attempt ended badly."),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every chunk; else 50 at most, troubled ones first.")
    ] = False,
) -> int:
    """Show a batch: its chunks, their attempts, what failed.

    Of chunks that failed the last lines of their output are shown too.

    With --json: the batch as `batches` shows it, and chunks: a list of all (or, with --failed, the
    troubled) {index, state, size, weight, due_at, outcome, reason, finished_at, items_ok, parent,
    attempts: [{number, outcome, exit_code, reason, log_tail, result_uri, opened_at, started_at,
    ended_at, settled_at, execution, handle, progress, task_index, console_url, logs_url}]} and,
    with --items, items and results: [{position, state, attempt, output, output_uri, error}].
    """
    return commands.show(scope, batch, items=items, failed=failed, everything=everything)


@command(app, "watch")
def watch(scope: Scope, batch: BatchId) -> int:
    """Follow a batch until it ends; exit with 0, 1 or 3 as it does.

    ^C stops watching, not the batch. With --json: a batch as `batches` shows it on a line of its
    own for each change, the last one as it ended.
    """
    return commands.watch(scope, batch)


@command(app, "logs")
def logs(
    scope: Scope,
    chunk: Annotated[str, typer.Argument(metavar="BATCH/CHUNK", help="The chunk.")],
    *,
    attempt: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Which attempt; the last if not given.")
    ] = None,
    tail: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many lines.")] = 100,
) -> int:
    """Show the last lines that an attempt wrote.

    They are read where it ran; where that cannot be, what was kept when it failed is shown. With
    --json: {batch, chunk, attempt, handle, console_url, logs_url, source (backend or stored),
    problem, lines}.
    """
    return commands.logs_of(scope, chunk, attempt=attempt, tail=tail)


@command(app, "retry")
def retry(
    scope: Scope,
    batch: BatchId,
    *,
    failed: Annotated[
        bool,
        typer.Option("--failed/--all", help="Run again what did not succeed, or every chunk."),
    ] = True,
) -> int:
    """Reopen a batch that has ended: its failed chunks, or all.

    They are due again at once, with fresh budgets of attempts.

    With --json: the batch as `batches` shows it.
    """
    return commands.retry(scope, batch, failed=failed)


@command(app, "cancel")
def cancel(
    scope: Scope,
    batch: BatchId,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until nothing of it runs any more.")
    ] = False,
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="Kept in the audit.")
    ] = "cancelled from the command line",
) -> int:
    """Ask for the end of a batch.

    What waits ends at once; what runs is stopped again and again until that is confirmed.

    Exits with 0 if the cancel stands or is done, and with 1 if the batch had ended otherwise
    before. With --json: the batch as `batches` shows it.
    """
    return commands.cancel(scope, batch, wait=wait, reason=reason)


@command(app, "explain")
def explain(
    scope: Scope,
    what: Annotated[str, typer.Argument(metavar="BATCH[/CHUNK]", help="A batch or a chunk.")],
) -> int:
    """Say why a batch or chunk is where it is, and what comes next.

    With --json: {text, batch, chunk, state, at, reasons: [{code, text, and the facts of that
    reason}]}.
    """
    return commands.explain(scope, what)


@command(app, "audit")
def audit(
    scope: Scope,
    batch: Annotated[
        str | None,
        typer.Argument(metavar="BATCH", help="Only of this batch.", show_default=False),
    ] = None,
    *,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only since: 2025-11-20T06:00, 90m, 2d.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only before this time.")
    ] = None,
) -> int:
    """Print who did what and when, oldest first.

    With --json: JSON lines, an event a line: {id, at, actor, kind, batch, chunk, attempt,
    execution, old, new, reason, subject}. The subject of an enqueued batch has its job, target,
    params, labels and key; that of an execution its key and target, with what was asked of the
    provider (image or command, env, options; secrets masked; differs_by_task names what its tasks
    were given other values of), or its handle and console_url.
    """
    return commands.audit(scope, batch, since=since, until=until)


# --- operate --------------------------------------------------------------------------------------


@command(app, "jobs")
def jobs(scope: Scope) -> int:
    """List the configured jobs.

    With --json: a list of jobs with the fields of the jobs file, defaults filled in, secrets
    masked.
    """
    return commands.jobs(scope)


@command(app, "check")
def check(
    scope: Scope,
    *,
    worker: Annotated[
        bool,
        typer.Option("--worker", help="Only look for a live worker on this host: a health check."),
    ] = False,
) -> int:
    """Check settings, servers, jobs, workers and targets.

    Each line says what is right or wrong, and what to do about it.

    Exits with 0 if nothing failed, 4 if a server cannot be reached, else 1. With --json:
    {ok, checks: [{name, level (ok, warn or fail), text, todo, unreachable}]}.
    """
    return commands.check(scope, worker=worker)


@command(app, "apply")
def apply(
    scope: Scope,
    job: Annotated[
        list[str] | None,
        typer.Argument(metavar="JOB", help="Only of these jobs.", show_default=False),
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if something differs.")
    ] = False,
) -> int:
    """Create or update the definitions that jobs have for their provider.

    The differences are shown first. Only what `options.definition` of a job sets is compared and
    written. With --json: a list of {job, target, changes: [{path, old, new}], applied (its name at
    the provider, or null)}; it asks all the same without --yes.
    """
    return commands.apply(scope, job or [], yes=yes, check_only=check)


@command(app, "standalone")
def standalone(
    scope: Scope,
    *,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir", metavar="DIR", help="Keeps everything in it.", show_default=".dispatcher"
        ),
    ] = None,
    flower: Annotated[bool, typer.Option("--flower/--no-flower", help="Start Flower too.")] = True,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Worker processes.")] = 1,
    flower_port: Annotated[
        int, typer.Option(metavar="PORT", help="Flower's loopback port.")
    ] = 5555,
    postgres_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="Postgres's loopback port.", show_default="a socket"),
    ] = None,
    valkey_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="Valkey's loopback port.", show_default="a socket"),
    ] = None,
    database: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="A further database; its URL is in NAME_DATABASE_URL. May be repeated.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    prepare: Annotated[
        str, typer.Option(metavar="COMMAND", help="Run this before the workers start.")
    ] = "",
) -> int:
    """Run everything on this machine until ^C.

    That is Postgres, Valkey, workers, beat and Flower. Other commands in the same directory find
    it by themselves. With --json: nothing more than without; it says where things are in
    DIR/standalone.json.
    """
    return commands.run_standalone(
        scope,
        directory=directory,
        flower=flower,
        workers=workers,
        flower_port=flower_port,
        postgres_port=postgres_port,
        valkey_port=valkey_port,
        databases=database,
        prepare=prepare,
    )


@command(db, "upgrade")
def db_upgrade(scope: Scope) -> int:
    """Bring the tables to this code's revision. Safe to repeat.

    With --json: {revision, was}.
    """
    return commands.db_upgrade(scope)


@command(db, "check")
def db_check(scope: Scope) -> int:
    """Say whether the tables fit this code; exit with 1 if not.

    With --json: {ok, revision, needed, problem}.
    """
    return commands.db_check(scope)


@command(db, "downgrade")
def db_downgrade(
    scope: Scope,
    revision: Annotated[
        str, typer.Argument(metavar="REVISION", help="Where to: its number, or base for no tables.")
    ],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> int:
    """Bring the tables back to an older revision.

    What the newer tables and columns hold is lost.

    With --json: {revision, was}.
    """
    return commands.db_downgrade(scope, revision, yes=yes)


app.add_typer(db)
app.add_typer(emulators.register(command))


def main() -> None:
    """Run the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show a character gets its number, and not a traceback.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="dispatcher")
    except OSError as error:  # help that cannot be written; a command tells of its own
        if not _is_of_output(error):
            raise
        sys.exit(_tell_of_output(error))

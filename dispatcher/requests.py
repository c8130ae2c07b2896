"""From rows to the request of a launch. Pure: the same rows give the same request, to the byte.

That is what lets any worker repeat a launch that another one meant, under the same key.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import zip_longest
from math import ceil
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from dispatcher.backends.base import Backend, Definition, LaunchRequest, TaskInput
from dispatcher.documents import DOCUMENT_BYTES, LINE_BYTES
from dispatcher.errors import InvalidInput
from dispatcher.items import join_items, split_items
from dispatcher.job import Job
from dispatcher.redaction import excerpt, redact_env
from dispatcher.storage import LONGEST_SIGNED
from dispatcher.storing import SIGNED_TASKS, SIGNING_MARGIN, signs_results
from dispatcher.templating import Values, render, uses_chunk, uses_pack

__all__ = ["Plan", "audit_copy", "check_chunk", "join_arrays", "launch_request", "new_key"]

Entry = TypeVar("Entry")

ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"

AUDIT_BYTES: Final = 15 * 1024
"""Bytes of JSON that each part of an audit copy may take: its command, args, env and options."""

DIFFERING: Final = 20
"""Places in which tasks differ that an audit copy names."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the chunks of one batch are launched: its job read against the backend of its target."""

    batch_id: str
    job: Job
    params: Mapping[str, Any]
    labels: Mapping[str, str]
    options: BaseModel
    max_tasks: int
    """Chunks that one execution may hold."""

    parallelism: int
    """Tasks of one execution that run at once, at most."""

    wrapped: bool = False
    """Each task's args and env go into the input document, for the image's entry wrapper."""

    packed_bytes: int | None = None
    """Bytes of items that one execution may carry, over all its tasks; None: no bound."""

    line_bytes: int = 0
    """What each chunk adds to its items there."""

    definition_key: str = ""
    """The same for all plans whose options are the same, and with them what they name."""

    signed: bool = False
    """Each task is given signed URLs of its own, to write its receipt and its progress to."""

    @classmethod
    def read(
        cls,
        batch_id: str,
        job: Job,
        params: Mapping[str, Any],
        labels: Mapping[str, str],
        backend: Backend,
    ) -> Plan:
        """Read a batch's job against a backend.

        Raises:
            pydantic.ValidationError: the job's options do not fit the backend.
        """
        options = backend.Options.model_validate(job.options)
        limits, texts = backend.limits, (*job.args, *job.env.values())
        most = min(limits.max_tasks, getattr(options, "max_tasks", None) or 1)
        signed = signs_results(job)
        if signed:
            most = min(most, SIGNED_TASKS)
        by_chunk = not limits.per_task_env and any(map(uses_chunk, texts))
        # The wrapper stands before the image's own command: it takes all that varies from the input
        # document, as args that are set from outside would take that command's place.
        wrapped = not limits.per_task_env and bool(getattr(options, "wrapped", False))
        if by_chunk and not wrapped:
            most = 1
        parallelism = min(most, getattr(options, "parallelism", None) or most)
        room, line = None if limits.per_task_env else DOCUMENT_BYTES, LINE_BYTES
        if any(map(uses_pack, texts)):
            room, line = min(limits.inline_bytes, limits.max_text_bytes), 1
        return cls(
            batch_id,
            job,
            params,
            labels,
            options,
            most,
            parallelism,
            wrapped,
            room,
            line,
            options.model_dump_json(),
            signed,
        )

    def under(self, definition: Definition) -> Plan:
        """Keep to what the provider's definition fixes."""
        enforced = definition.parallelism
        if enforced is None or enforced >= self.parallelism:
            return self
        return replace(self, parallelism=enforced)

    def pack_tasks(self, largest_chunk: int | None) -> int:
        """Say how many chunks go into one execution, given the bytes of the batch's largest."""
        if self.packed_bytes is None or not largest_chunk:
            return self.max_tasks
        each = largest_chunk + self.line_bytes
        return max(1, min(self.max_tasks, self.packed_bytes // each))

    def times(self, tasks: int, parallelism: int) -> tuple[timedelta, timedelta]:
        """Say how long an execution may take to start, and from there to end."""
        return self.job.start_timeout, self.job.timeout * ceil(tasks / parallelism) + SLACK

    def signed_for(self, tasks: int, parallelism: int) -> timedelta:
        """Say how long the URLs of an execution are to work, as far as any can."""
        start, run = self.times(tasks, parallelism)
        return min(start + run + SIGNING_MARGIN, LONGEST_SIGNED)


SLACK: Final = timedelta(seconds=30)
"""What a provider gets on top of `timeout` to stop a task by itself before we cancel."""


def new_key(batch_id: str) -> str:
    """Make the key of an execution: unique for ever, and a legal name at every provider."""
    return f"d-{batch_id}-{''.join(secrets.choice(ALPHABET) for _ in range(8))}"


def launch_request(
    plan: Plan,
    key: str,
    instance: str,
    chunks: Sequence[tuple[int, int, Sequence[int] | None]],
    items: Mapping[int, str],
    *,
    intended_at: datetime,
    parallelism: int | None = None,
) -> LaunchRequest:
    """Write the request of an execution over chunks, given as (index, attempt number, positions).

    Positions are the items of a chunk that this attempt is to work on; None means all.

    `parallelism` is that of its row, where there is one already: what the provider's definition
    says now may have changed since.
    """
    tasks = []
    texts = (*plan.job.args, *plan.job.env.values())
    packed = None
    if any(map(uses_pack, texts)):
        packed = join_arrays(_pick(items[index], positions) for index, _, positions in chunks)
    same: dict[str, str] = {}

    def fill(text: str, values: Values) -> str:
        """Fill a text once where it is the same for all tasks: a pack's may be long."""
        if uses_chunk(text):
            return render(text, values)
        if text not in same:
            same[text] = render(text, values)
        return same[text]

    for place, (index, number, positions) in enumerate(chunks):
        text = _pick(items[index], positions)
        values = Values(
            items=text,
            params=plan.params,
            chunk_index=index,
            attempt=number,
            batch_id=plan.batch_id,
            pack=packed,
        )
        tasks.append(
            TaskInput(
                index=place,
                chunk_index=index,
                attempt=number,
                items=text,
                args=tuple(fill(text, values) for text in plan.job.args),
                env={name: fill(text, values) for name, text in plan.job.env.items()},
            )
        )
    return LaunchRequest(
        key=key,
        instance=instance,
        batch_id=plan.batch_id,
        job=plan.job.name,
        command=plan.job.command,
        clear_args=plan.job.clear_args,
        tasks=tuple(tasks),
        options=plan.options,
        timeout=plan.job.timeout,
        parallelism=parallelism or min(plan.parallelism, len(tasks)),
        intended_at=intended_at,
        wrapped=plan.wrapped,
        labels=plan.labels,
    )


def _pick(items: str, positions: Sequence[int] | None) -> str:
    """Take some items of a chunk, each as it was written."""
    if positions is None:
        return items
    texts = split_items(items)
    return join_items(texts[position] for position in positions)


def join_arrays(arrays: Iterable[str]) -> str:
    """Write one JSON array of what several hold, without parsing them."""
    inner = (array.strip()[1:-1].strip() for array in arrays)
    return f"[{','.join(text for text in inner if text)}]"


def check_chunk(
    job: Job,
    batch_id: str,
    params: Mapping[str, Any],
    index: int,
    items: str,
    *,
    max_text_bytes: int,
) -> None:
    """Fill a chunk's templates once when it is planned, so that no launch can fail on them.

    Raises:
        InvalidInput: an item or a param does not fit the template that it goes into, or what it is
            filled with is larger than the target can hand to a program.
    """
    values = Values(items=items, params=params, chunk_index=index, attempt=1, batch_id=batch_id)
    places = [*((f"args.{i}", text) for i, text in enumerate(job.args))]
    places += [(f"env.{name}", text) for name, text in job.env.items()]
    for where, text in places:
        if "{" in text:
            size = len(render(text, values).encode(errors="surrogatepass"))
            if size > max_text_bytes:
                raise InvalidInput(
                    f"chunk {index} makes the job's {where} {size} bytes long; target {job.target} "
                    f"takes {max_text_bytes} at most: put fewer items in a chunk, or have the "
                    "program read DISPATCH_ITEMS or DISPATCH_INPUT_URI"
                )


def audit_copy(request: LaunchRequest) -> str:
    """Write what is asked of the provider as JSON for the audit, secrets redacted.

    The items are not repeated: they stay with their chunks. Args and env are those of the first
    task; `differs_by_task` names those in which others differ, by what templates took from their
    chunk. It is written in the
    transaction that claims a launch, so it is bounded whatever a template was filled with: each
    value to 2,000 characters, and the whole to 64 KiB.
    """
    first = request.tasks[0]
    options = request.options.model_dump(mode="json", exclude_defaults=True)
    differing = _differing(request.tasks)
    return json.dumps(
        {
            "command": _excerpts(request.command),
            "args": _excerpts(first.args),
            **({"clear_args": True} if request.clear_args else {}),
            "env": _env_excerpts(first.env),
            "options": options
            if _json_bytes(options) <= AUDIT_BYTES
            else {"…": f"{_json_bytes(options)} bytes are left out"},
            **({"differs_by_task": differing} if differing else {}),
            "tasks": len(request.tasks),
            "parallelism": request.parallelism,
            "timeout": request.timeout.total_seconds(),
        },
        ensure_ascii=False,
    )


def _differing(tasks: Sequence[TaskInput]) -> list[str]:
    """Name what tasks were given that differs from the first one's: `args.0`, `env.IDS`."""
    first, *others = tasks
    args, env = set(), set()
    for task in others:
        if task.args != first.args:
            pairs = enumerate(zip_longest(first.args, task.args))
            args |= {place for place, (theirs, ours) in pairs if theirs != ours}
        if task.env != first.env:
            names = first.env.keys() | task.env.keys()
            env |= {name for name in names if first.env.get(name) != task.env.get(name)}
    found = [*(f"args.{place}" for place in sorted(args)), *(f"env.{name}" for name in sorted(env))]
    left = len(found) - DIFFERING
    return [name[:100] for name in found[:DIFFERING]] + ([f"… ({left} more)"] if left > 0 else [])


def _excerpts(texts: Sequence[str]) -> list[str]:
    """Copy texts for the audit, as many as there is room for."""
    shown = list(_fitting(map(excerpt, texts)))
    left = len(texts) - len(shown)
    return [*shown, f"… ({left} more)"] if left else shown


def _env_excerpts(env: Mapping[str, str]) -> dict[str, str]:
    """Copy an environment for the audit, as much of it as there is room for."""
    shown = dict(_fitting(pair for name in env for pair in redact_env({name: env[name]}).items()))
    left = len(env) - len(shown)
    return {**shown, "…": f"{left} more"} if left else shown


def _fitting(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield entries until their JSON has filled a part's room; none is made beyond that."""
    room = AUDIT_BYTES
    for entry in entries:
        room -= _json_bytes(entry) + len(", ")
        if room < 0:
            return
        yield entry


def _json_bytes(value: object) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))

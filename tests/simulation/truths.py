"""What must hold in a story: after each step, and at its end.

The tables and their audit are compared with each other by `lifecycle.py`. Here they are compared
with the provider, which knows what really ran.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, Final

from lifecycle import EDGES, NEVER, assert_invariants
from simulation.story import (
    HERE,
    JOBS,
    WORKERS,
    Advance,
    Continue,
    Enqueue,
    Step,
    Story,
    Strays,
    Turn,
)

from dispatcher.retrying import APPLICATION, INFRASTRUCTURE

__all__ = ["Truths"]

QUICK: Final = " UNION ALL ".join(
    f"SELECT {number} WHERE EXISTS ({statement})" for number, statement in enumerate(NEVER.values())
)
"""All of `lifecycle.py`'s statements in one round trip."""

LIVE: Final = ("intended", "unknown", "launched")
FINAL: Final = ("succeeded", "failed", "cancelled", "split")
BY_OPERATOR: Final = "retry"


class Truths:
    """What must hold of one story."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self._seen = 0
        self._last: dict[tuple[object, ...], str] = {}

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self._story.database.raw.execute(statement, values or None).fetchall()

    # --- after each step --------------------------------------------------------------------------

    def check(self) -> None:
        """Fail if anything is wrong now."""
        if self._rows(QUICK):
            with self._story.database.engine.connect() as connection:
                assert_invariants(connection)
        self._check_moves()
        executions = self._rows(
            "SELECT id, key, batch_id, job_name, state, stray, handle, open_tasks, parallelism,"
            " calls, call_by IS NULL, next_call_at IS NULL, next_look_at IS NULL"
            " FROM dispatcher.execution ORDER BY id"
        )
        self._check_waits(executions)
        self._check_limits(executions)
        self._check_world(executions)
        self._check_attempts()

    def _check_moves(self) -> None:
        """Follow the new events: along the edges, without a gap; out of an end only by retry."""
        for number, kind, batch, chunk, execution, old, new, reason in self._rows(
            "SELECT id, kind, batch_id, chunk_index, execution_id, old, new, reason"
            " FROM dispatcher.event WHERE id > %s ORDER BY id",
            self._seen,
        ):
            self._seen = number
            if kind == "target" or (old is None and new is None):
                continue
            subject = (
                (kind, execution)
                if kind == "execution"
                else (kind, batch, chunk if kind == "chunk" else None)
            )
            assert (old, new) in EDGES[kind], f"{subject}: {old} → {new} is no edge ({reason})"
            was = self._last.get(subject)
            assert was == old, f"{subject} moves {old} → {new} and was {was} ({reason})"
            if kind != "execution" and old in FINAL:
                assert reason == BY_OPERATOR, f"{subject} left {old} by {reason}"
            self._last[subject] = new

    def _check_waits(self, executions: list[tuple[Any, ...]]) -> None:
        """Whatever is not clear has a time at which it is looked at again."""
        for id_, key, _, _, state, _, _, _, _, _, no_call_by, no_call, no_look in executions:
            if state == "unknown":
                assert not no_look, f"nobody looks for {id_} {key}"
                assert not no_call_by, f"the grace of {id_} {key} never begins"
            if state == "intended":
                assert no_call_by != no_call, f"nobody calls {id_} {key}, or two do"

    def _check_limits(self, executions: list[tuple[Any, ...]]) -> None:
        """Slots are never overshot, in the rows and at the provider."""
        place, world = self._story.place, self._story.world
        now = self._story.now.timestamp()
        live = [row for row in executions if row[4] in LIVE and not row[5]]
        slots = sum(min(row[7], row[8]) for row in live)
        ran = sum(
            run.start <= now < run.end
            for handle, execution in world._executions.items()
            if execution.request.key not in self._story.late
            for run in execution.runs
        )
        if place.max_running is not None:
            assert slots <= place.max_running, f"{slots} slots of {place.max_running}"
            assert ran <= place.max_running, f"{ran} tasks run, {place.max_running} may"
        if place.max_executions is not None:
            assert len(live) <= place.max_executions, f"{len(live)} executions"
        by_job: Counter[str] = Counter()
        by_batch: Counter[tuple[str, str]] = Counter()
        for row in live:
            by_job[row[3]] += min(row[7], row[8])
            by_batch[row[3], row[2]] += min(row[7], row[8])
        for job, used in by_job.items():
            limit = JOBS[job].limits.running
            assert limit is None or used <= limit, f"{used} slots of {job}, {limit} allowed"
        for (job, batch), used in by_batch.items():
            limit = JOBS[job].limits.per_batch
            assert limit is None or used <= limit, f"{used} slots of {batch}, {limit} allowed"

    def _check_world(self, executions: list[tuple[Any, ...]]) -> None:
        """What runs is known and wanted; a key runs once."""
        story, world = self._story, self._story.world
        now = story.now.timestamp()
        rows = {row[1]: row for row in executions}
        strays = {row[6] for row in executions if row[5] and row[4] == "launched"}
        calls = Counter(story.calls)
        for key, known in world._by_key.items():
            if not known:
                continue
            assert key in rows, f"{key} runs and was never written"
            row = rows[key]
            assert calls[key] <= row[9], f"{key} was called {calls[key]} times, {row[9]} written"
            alive = [e for e in known if e.handle in world._executions]
            if story.place.safe or key not in story.late:
                assert len(alive) <= 1, f"{key} was started {len(alive)} times"
            for execution in alive:
                if not any(run.end > now for run in execution.runs) or key in story.late:
                    continue
                handle = execution.handle
                owned = row[4] in LIVE and row[6] in (None, handle)
                assert owned or handle in strays, f"{handle} runs and belongs to nobody: {row}"
        final = {
            row[0]
            for row in self._rows(
                "SELECT id FROM dispatcher.batch WHERE state = ANY(%s)", list(FINAL)
            )
        }
        for handle, execution in world._executions.items():
            request = execution.request
            if request.batch_id in final and request.key not in story.late:
                assert all(run.end <= now for run in execution.runs), (
                    f"{handle} runs though batch {request.batch_id} is over"
                )

    def _check_attempts(self) -> None:
        """An outcome is what the provider knows; a success is never lost; budgets are kept."""
        story, world = self._story, self._story.world
        now = story.now.timestamp()
        by_handle = {e.handle: e for known in world._by_key.values() for e in known}
        tallies: defaultdict[tuple[str, str, int], Counter[str]] = defaultdict(Counter)
        for batch, job, chunk, number, outcome, index, handle, kind, budget_from in self._rows(
            "SELECT a.batch_id, b.job_name, a.chunk_index, a.number, a.outcome, a.task_index,"
            " e.handle, e.cancel_kind, c.budget_from"
            " FROM dispatcher.attempt a JOIN dispatcher.execution e ON e.id = a.execution_id"
            " JOIN dispatcher.batch b ON b.id = a.batch_id"
            " JOIN dispatcher.chunk c ON c.batch_id = a.batch_id AND c.index = a.chunk_index"
            " WHERE a.outcome IS NOT NULL"
        ):
            name = f"{batch}/{chunk} attempt {number}"
            if number > budget_from:
                tallies[job, batch, chunk][outcome] += 1
            execution = by_handle.get(handle)
            run = execution.runs[index] if execution is not None else None
            if outcome == "succeeded":
                assert run is not None, f"{name} succeeded and never ran"
                assert run.end <= now, f"{name} succeeded and runs"
                assert run.ending.outcome == outcome, f"{name} was {run.ending.outcome}"
            elif run is not None and run.end <= now and run.ending.outcome == "succeeded":
                gone = handle not in world._executions
                assert gone or kind is not None, f"{name} succeeded and is {outcome}"
        for (job, batch, chunk), tally in tallies.items():
            policy = JOBS[job].retry
            used = sum(tally[one] for one in APPLICATION)
            assert used <= policy.attempts, f"{batch}/{chunk}: {used} attempts"
            used = sum(tally[one] for one in INFRASTRUCTURE)
            assert used <= policy.infrastructure_attempts, f"{batch}/{chunk}: {used} attempts"
            assert tally["succeeded"] <= 1, f"{batch}/{chunk} succeeded twice"

    # --- at the end -------------------------------------------------------------------------------

    def comes_to_an_end(self) -> None:
        """Once faults stop, every batch ends in bounded time, and then nothing is left anywhere."""
        story = self._story
        story.calm_down()
        self._tick_until_over(90, "faults have stopped and healthy workers do their turns")
        while story.frozen:
            self._take(Continue())
        self._take(Advance(20))
        self._take(Strays())
        self._tick_until_over(30, "the frozen have gone on")
        assert story.world.running() == 0, "something runs on and nobody follows it"
        self._take(Enqueue("single", 2))
        self._tick_until_over(30, "a batch was asked for when all was well again")
        (last,) = self._rows("SELECT state FROM dispatcher.batch WHERE id = %s", story.batches[-1])
        assert last == ("succeeded",), "nothing was in its way"
        down = self._rows("SELECT down_reason FROM dispatcher.target WHERE down_since IS NOT NULL")
        assert not down, f"the target has answered a launch and is taken for down: {down}"
        with story.database.engine.connect() as connection:
            assert_invariants(connection)

    def _take(self, step: Step) -> None:
        self._story.take(step)
        self.check()

    def _tick_until_over(self, ticks: int, what: str) -> None:
        """Let healthy workers take turns, with time between: 2 s at first, then 10 s."""
        for tick in range(ticks):
            self._take(Turn(tick % WORKERS))
            self._take(Turn((tick + 1) % WORKERS))
            if tick % 4 == 3:
                self._take(Strays(tick % WORKERS))
            if self._story.is_over():
                return
            self._take(Advance(2 if tick < 10 else 10))
        left = self._rows(
            "SELECT 'batch', id, state, reason FROM dispatcher.batch"
            " WHERE state IN ('planning', 'running') UNION ALL"
            " SELECT 'execution', key, state, reason FROM dispatcher.execution"
            " WHERE state <> 'ended'"
        )
        raise AssertionError(f"{what}, and this goes on and on at {HERE}: {left}")

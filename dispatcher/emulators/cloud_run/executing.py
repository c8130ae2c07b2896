"""The life of an execution: when its tasks start, how they end, and when it is complete.

Every method runs with the world's lock held, called by the API or by the timetable. The state is in
`records.py`, and what an attempt does is the runner's business.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Final

from dispatcher.emulators.cloud_run.faults import Faults, Kind
from dispatcher.emulators.cloud_run.journal import Journal
from dispatcher.emulators.cloud_run.options import EmulatorOptions
from dispatcher.emulators.cloud_run.quantities import DEFAULT_CPU, DEFAULT_MEMORY
from dispatcher.emulators.cloud_run.records import (
    ExecutionRecord,
    Stop,
    TaskRecord,
    TaskState,
)
from dispatcher.emulators.cloud_run.refusal import Code
from dispatcher.emulators.cloud_run.results import SIGKILL, SIGTERM, attempt_result
from dispatcher.emulators.cloud_run.tasks import Handle, Line, Runner, TaskEnd, TaskStart
from dispatcher.emulators.cloud_run.timetable import Timetable

__all__ = ["Executor"]

STARTS_AT_ONCE: Final = 500
"""Attempts started before others get the lock."""


class Executor:
    """Runs executions.

    Attributes:
        starts: every attempt that was started, in order: who asserts that work was done once,
            counts here.
        running: executions that have not completed.
        on_completed: called with each execution that completes.
    """

    def __init__(
        self,
        options: EmulatorOptions,
        runner: Runner,
        faults: Faults,
        timetable: Timetable,
        journal: Journal,
        lock: threading.RLock,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._runner = runner
        self._faults = faults
        self._timetable = timetable
        self._journal = journal
        self._lock = lock
        self._clock = clock
        limits = [one for one in (options.max_parallel_tasks, runner.limit) if one is not None]
        self._limit = min(limits) if limits else None
        self._busy = 0
        self._hungry: OrderedDict[ExecutionRecord, None] = OrderedDict()
        self.starts: list[TaskStart] = []
        self.running: set[ExecutionRecord] = set()
        self.most_busy = 0
        self.on_completed: Callable[[ExecutionRecord], None] = lambda _: None

    @property
    def busy(self) -> int:
        """Attempts that run now, over all executions."""
        return self._busy

    # --- starting ---------------------------------------------------------------------------------

    def launch(self, execution: ExecutionRecord, now: float) -> None:
        """Take up a new execution."""
        self.running.add(execution)
        self._touch(execution, now)
        slow = self._faults.strike(Kind.SLOW_START, execution.job_id)
        delay = self._options.start_seconds + (slow.seconds if slow else 0.0)
        self._timetable.at(now + delay, partial(self._begin, execution))

    def _begin(self, execution: ExecutionRecord, moment: float) -> None:
        if execution.stopping or execution.done:
            return
        if not self._runner.has_image(execution.template.containers[0].image):
            execution.missing_image = True
            image = execution.template.containers[0].image
            execution.failure = f"Image '{image}' not found."
            self._end_waiting(execution, moment, TaskState.FAILED)
            self._complete(execution, moment)
            return
        self._fill(execution, moment)

    def _fill(self, execution: ExecutionRecord, moment: float) -> None:
        """Start what may start of an execution."""
        if execution.stopping or execution.done:
            return
        budget = STARTS_AT_ONCE
        limit = self._limit
        while execution.running < execution.parallelism:
            if limit is not None and self._busy >= limit:
                if execution.again or execution.next_index < execution.task_count:
                    self._hungry[execution] = None
                return
            if not budget:
                self._timetable.at(moment, partial(self._fill, execution))
                return
            if execution.again:
                index = execution.again.popleft()
            elif execution.next_index < execution.task_count:
                index = execution.next_index
                execution.next_index += 1
            else:
                return
            budget -= 1
            self._start(execution, execution.tasks[index], moment)

    def _feed(self, execution: ExecutionRecord, moment: float) -> None:
        """An attempt has ended: fill its own execution's place, or that of one that waits."""
        self._fill(execution, moment)
        while self._hungry and self._limit is not None and self._busy < self._limit:
            waiting, _ = self._hungry.popitem(last=False)
            self._fill(waiting, moment)

    def _start(self, execution: ExecutionRecord, task: TaskRecord, moment: float) -> None:
        task.attempt += 1
        task.state = TaskState.RUNNING
        task.stop = None
        task.started_at = moment if task.started_at is None else task.started_at
        if execution.started_at is None:
            execution.started_at = moment
        execution.running += 1
        self._busy += 1
        self.most_busy = max(self.most_busy, self._busy)
        self._touch(execution, moment)
        container = execution.template.containers[0]
        start = TaskStart(
            execution=execution.name,
            job=execution.job_id,
            index=task.index,
            count=execution.task_count,
            attempt=task.attempt,
            image=container.image,
            command=execution.command,
            args=execution.args,
            env=execution.env,
            at=moment,
            working_dir=container.working_dir,
            memory=container.resources.limits.get("memory", DEFAULT_MEMORY),
            cpu=container.resources.limits.get("cpu", DEFAULT_CPU),
        )
        self.starts.append(start)
        self._run(execution, task, start, moment)

    def _run(
        self, execution: ExecutionRecord, task: TaskRecord, start: TaskStart, moment: float
    ) -> None:
        attempt = task.attempt
        failing = self._faults.strike(Kind.FAIL_TASKS, execution.job_id)
        outcome: TaskEnd | Handle
        if failing is not None:
            outcome = TaskEnd(
                seconds=failing.seconds,
                exit_code=failing.exit_code,
                out_of_memory=failing.out_of_memory,
            )
        else:
            try:
                outcome = self._runner.start(
                    start,
                    partial(self._wrote, execution, task.index, attempt),
                    partial(self._reported, execution, task, attempt),
                )
            except Exception as error:  # noqa: BLE001 - a script's mistake is told at the end
                self._timetable.failures.append(error)
                outcome = TaskEnd(exit_code=1, lines=(Line(f"the script failed: {error!r}", True),))
        killing = self._faults.strike(Kind.KILL_TASKS, execution.job_id)
        kill_at = killing.seconds if killing else math.inf
        end = TaskEnd(seconds=math.inf)
        if isinstance(outcome, TaskEnd):
            task.end = end = outcome
        else:
            task.handle = outcome
        if kill_at < min(end.seconds, execution.timeout):
            self._timetable.at(
                moment + kill_at, partial(self._stop_attempt, execution, task, attempt, Stop.KILL)
            )
        elif end.seconds <= execution.timeout:
            self._timetable.at(
                moment + end.seconds, partial(self._ended, execution, task, attempt, end)
            )
        else:
            self._timetable.at(
                moment + execution.timeout,
                partial(self._stop_attempt, execution, task, attempt, Stop.TIMEOUT),
            )

    # --- ending -----------------------------------------------------------------------------------

    def _wrote(self, execution: ExecutionRecord, index: int, attempt: int, line: Line) -> None:
        self._journal.write(execution, index, attempt, line, self._clock())

    def _reported(
        self, execution: ExecutionRecord, task: TaskRecord, attempt: int, end: TaskEnd
    ) -> None:
        """A runner tells, from its own thread, that an attempt has ended."""
        with self._lock:
            self._ended(execution, task, attempt, end, self._clock())

    def _stop_attempt(
        self, execution: ExecutionRecord, task: TaskRecord, attempt: int, why: Stop, moment: float
    ) -> None:
        """Stop an attempt, if it is still that one and runs."""
        if task.attempt != attempt or task.state is not TaskState.RUNNING:
            return
        task.stop = task.stop or why
        if task.handle is not None:
            (task.handle.kill if why is Stop.KILL else task.handle.stop)()
            return
        end = task.end or TaskEnd()
        delay = 0.0 if why is Stop.KILL else end.stop_seconds
        stopped = TaskEnd(
            term_signal=SIGKILL if why is Stop.KILL else SIGTERM, lines=end.lines if delay else ()
        )
        self._timetable.at(moment + delay, partial(self._ended, execution, task, attempt, stopped))

    def _ended(
        self,
        execution: ExecutionRecord,
        task: TaskRecord,
        attempt: int,
        end: TaskEnd,
        moment: float,
    ) -> None:
        """An attempt has ended: keep its result, and start what follows.

        guess: failed_task_stops_nothing, retry_at_once, cancel_race, cancelled_tasks.
        """
        if task.attempt != attempt or task.state is not TaskState.RUNNING:
            return
        for line in end.lines:
            written = line if isinstance(line, Line) else Line(line)
            self._journal.write(execution, task.index, attempt, written, moment)
        if end.effect is not None and task.stop is None:
            end.effect()
        memory = execution.template.containers[0].resources.limits.get("memory", DEFAULT_MEMORY)
        task.result = attempt_result(end, task.stop, memory)
        task.ended_at = moment
        task.handle = task.end = None
        execution.running -= 1
        self._busy -= 1
        if task.stop is Stop.CANCEL:
            self._settle(execution, task, TaskState.CANCELLED)
        elif task.result.code is Code.OK:
            self._settle(execution, task, TaskState.SUCCEEDED)
        elif end.missing_image:  # guess: late_missing_image
            self._settle(execution, task, TaskState.FAILED)
            execution.missing_image = True
            execution.failure = task.result.message
            self._end_waiting(execution, moment, TaskState.FAILED)
        elif (
            attempt < execution.max_retries
            and not execution.stopping
            and not execution.missing_image
        ):
            task.state = TaskState.WAITING
            execution.retried += 1
            execution.again.append(task.index)
        else:
            self._settle(execution, task, TaskState.FAILED)
            execution.failure = execution.failure or (
                f"Task {execution.id}-task{task.index} failed with message: {task.result.message}"
            )
        self._touch(execution, moment)
        if execution.ended == execution.task_count:
            self._complete(execution, moment)
        self._feed(execution, moment)

    def _settle(self, execution: ExecutionRecord, task: TaskRecord, state: TaskState) -> None:
        task.state = state
        if state is TaskState.SUCCEEDED:
            execution.succeeded += 1
        elif state is TaskState.FAILED:
            execution.failed += 1
        else:
            execution.cancelled += 1

    def _end_waiting(self, execution: ExecutionRecord, moment: float, state: TaskState) -> None:
        for task in execution.tasks:
            if task.state is TaskState.WAITING:
                task.ended_at = moment
                self._settle(execution, task, state)
        execution.again.clear()
        execution.next_index = execution.task_count

    def _complete(self, execution: ExecutionRecord, moment: float) -> None:
        execution.completed_at = moment
        self.running.discard(execution)
        self._hungry.pop(execution, None)
        self._touch(execution, moment)
        self.on_completed(execution)

    # --- stopping ---------------------------------------------------------------------------------

    def cancel(self, execution: ExecutionRecord, now: float) -> None:
        """Begin to stop an execution. May be repeated."""
        if execution.cancelling or execution.done:
            return
        execution.cancelling = True
        self._touch(execution, now)
        slow = self._faults.strike(Kind.SLOW_CANCEL, execution.job_id)
        self._timetable.at(
            now + (slow.seconds if slow else 0.0), partial(self.stop_all, execution, Stop.CANCEL)
        )

    def stop_all(self, execution: ExecutionRecord, why: Stop, moment: float) -> None:
        """Stop every task of an execution now."""
        if execution.done or execution.stopping:
            return
        execution.cancelling = execution.stopping = True
        running = [task for task in execution.tasks if task.state is TaskState.RUNNING]
        self._end_waiting(execution, moment, TaskState.CANCELLED)
        for task in running:
            self._stop_attempt(execution, task, task.attempt, why, moment)
        self._touch(execution, moment)
        if not running:
            self._complete(execution, moment)

    def _touch(self, execution: ExecutionRecord, moment: float) -> None:
        """Note that something has changed, and what was so before if lists may want to know."""
        execution.version += 1
        execution.rendered.clear()
        keep = self._faults.history_seconds
        if keep:
            history = execution.history
            history.append((moment, execution.snapshot()))
            while len(history) > 1 and history[1][0] < moment - keep:
                history.popleft()

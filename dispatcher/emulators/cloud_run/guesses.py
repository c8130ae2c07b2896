"""What the vendor's documents leave open, and how this emulator fills it: one table.

Every other rule names the document that it follows beside the code: `clouds.md` is the project's
own collection of facts, "vendor" is Google's reference of the Cloud Run Admin API v2. A guess is
named there too, as "guess: " and its key. The page "Cloud Run" of the documentation prints this
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["GUESSES"]

GUESSES: Final[Mapping[str, str]] = {
    "page_size": "Lists give at most 100 records a page, and 100 where no size is asked for. "
    "Parameter `page_size`.",
    "task_order": "Tasks are listed by their index, lowest first.",
    "lists_are_current": "A list shows what happened up to now. Real lists may lag; the fault "
    "`stale_lists` makes these lag too.",
    "execution_token_name": "An execution that `start_execution_token` starts is named "
    "`<job>-<token>`; the same token again on an update starts nothing. "
    "`run_execution_token` does the same.",
    "run_keeps_etag": "RunJob does not change the etag of the job.",
    "override_name": "A container override without a name is for the job's only container; with "
    "several containers it is refused.",
    "duplicate_env": "A variable given twice in one list of overrides keeps the last value.",
    "reserved_env": "Refused names: CLOUD_RUN_*, PORT, K_SERVICE, K_REVISION, K_CONFIGURATION and "
    "X_GOOGLE_*. Only the CLOUD_RUN_ names of tasks are documented as reserved for jobs.",
    "tasks_under_parallelism": "RunJob with fewer tasks than the job's parallelism is refused with "
    "INVALID_ARGUMENT, as users reported in 2023; the code and the words are guessed.",
    "not_ready_job": "RunJob of a job that is not ready, such as one whose image is missing, is "
    "refused with FAILED_PRECONDITION.",
    "overrides_in_lists": "ListExecutions shows in an execution's template the variables and args "
    "that its launch gave over the job's, and not the job's own.",
    "failed_task_stops_nothing": "A task that failed for good does not stop the other tasks; the "
    "execution ends when each has ended.",
    "retry_at_once": "A failed attempt is followed by the next one at once, before tasks that "
    "wait.",
    "killed_is_failed": "An attempt that the infrastructure kills counts against `max_retries` "
    "like any other; its result has term_signal 9 and no exit code.",
    "task_status_codes": "Codes of last_attempt_result: 0 succeeded, 1 cancelled, 4 timeout, 8 "
    "memory, 10 exit code or signal, 13 not started.",
    "memory_message": "An attempt that ran out of memory has term_signal 9 and the message "
    "'Memory limit of … exceeded'.",
    "cancel_too_late": "Cancelling an execution that has completed is refused with "
    "FAILED_PRECONDITION.",
    "cancel_race": "Tasks that end by themselves before a cancel takes effect keep their outcome; "
    "if all succeed, so does the execution.",
    "cancelled_tasks": "A task that is stopped by a cancel, or had not started, counts as "
    "cancelled, whatever its exit code.",
    "stop_grace": "A container has 10 s between SIGTERM and SIGKILL. Parameter `stop_grace` of "
    "`ProcessRunner` and `ContainerRunner`.",
    "container_signals": "With an engine, a program without a handler ends at once by SIGTERM; a "
    "container that the emulator stops has a term_signal, and one that ends by a signal of its own "
    "the exit code 128 + N, as engines tell no signals.",
    "late_missing_image": "With an engine, whether an image exists is known only when a task "
    "needs it: then the execution ends as one whose image has gone since, and nothing is retried.",
    "delete_running": "Deleting a job or an execution that runs stops its tasks at once.",
    "too_many_running": "RunJob beyond `max_running` executions in a region is refused with "
    "RESOURCE_EXHAUSTED.",
    "too_many_jobs": "CreateJob beyond 1,000 jobs in a region is refused with "
    "RESOURCE_EXHAUSTED; the number is documented and the code guessed. Parameter `max_jobs`.",
    "minute": "A rate quota holds in any span of 60 s. Google counts fixed minutes, which lets "
    "through more around their change.",
    "refused_calls_count": "A call that is refused for its content has used its quota; one that is "
    "refused for the quota has not.",
    "operation_error": "The operation of an execution that did not succeed ends with the error "
    "ABORTED and the message of its Completed condition.",
    "job_operations": "The operations of CreateJob, UpdateJob and DeleteJob are done at once.",
    "little_memory": "Less memory than Google documents as the least, for a job or its cpus, is "
    "taken, so that running out of it can be tried with little.",
    "grants_on_jobs": "A grant on a job holds for its executions and tasks, and TestIamPermissions "
    "of a job answers for these too. Lists over all jobs need a grant on the project.",
    "first_container": "Only the first container of a job is run; sidecars are kept, and ignored.",
}

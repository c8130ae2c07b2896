"""What the local backend promises beyond the contract: one run and a true end, whatever dies."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import structlog
from processes import is_alive
from pydantic import ValidationError
from structlog.testing import capture_logs
from waiting import until

from dispatcher.backends import local, local_shim
from dispatcher.backends.base import (
    LaunchRequest,
    Phase,
    Rejected,
    Report,
    TaskInput,
    TaskReport,
    Unavailable,
)
from dispatcher.backends.local import LocalBackend, LocalOptions, LocalSettings
from dispatcher.job import Job
from dispatcher.states import Outcome


class Place:
    """A spool, and what a test asks of it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.spool = folder / "spool"
        self.backend = LocalBackend(
            "here", LocalSettings(**{"spool": self.spool, "stop_grace": 60.0, **settings})
        )
        self.evidence = folder / "runs"

    def request(self, key: str, script: str = "true", tasks: int = 1, **more: Any) -> LaunchRequest:
        """Tasks that leave a line of evidence each and then run a shell script."""
        request = LaunchRequest(
            key=key,
            instance="test",
            batch_id="b-1",
            job="job",
            command=("sh", "-c", f'echo run >> "$RUNS"\n{script}', "task"),
            tasks=tuple(
                TaskInput(i, i + 10, 1, f"[{i}]", env={"RUNS": str(self.evidence)})
                for i in range(tasks)
            ),
            options=LocalOptions(),
            timeout=timedelta(minutes=5),
            parallelism=tasks,
        )
        return replace(request, **more)

    def launch(self, key: str, script: str = "true", tasks: int = 1, **more: Any) -> Path:
        self.backend.launch(self.request(key, script, tasks, **more))
        return self.spool / key

    def report(self, key: str) -> Report:
        return self.backend.poll([key])[key]

    def ended(self, key: str) -> tuple[TaskReport, ...]:
        report = until(lambda: (r := self.report(key)).phase is Phase.ENDED and r, f"{key} ends")
        assert isinstance(report, Report)
        return report.tasks

    def only_end(self, key: str) -> TaskReport:
        (task,) = self.ended(key)
        return task

    def run(self, key: str, script: str, **more: Any) -> TaskReport:
        self.launch(key, script, **more)
        return self.only_end(key)

    def runs(self) -> int:
        return len(self.evidence.read_text().split()) if self.evidence.exists() else 0

    def logs(self, key: str, tail: int = 1000) -> list[str]:
        return list(self.backend.logs(key, 0, tail))

    def record(self, *names: str) -> dict[str, Any]:
        path = self.spool.joinpath(*names)
        record = until(lambda: local_shim.read_json(str(path)), str(path))
        assert isinstance(record, dict)
        return record

    def rewrite(self, *names: str, **changes: Any) -> None:
        path = self.spool.joinpath(*names)
        path.write_text(json.dumps({**self.record(*names), **changes}))

    def kill_shim(self, key: str) -> None:
        """Kill it once its first task has a process."""
        self.record(key, "0", "process.json")
        pid = self.record(key, "started.json")["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_alive(pid), "the shim dies")


def remarks(place: Place, options: LocalOptions, program: str) -> tuple[str, ...]:
    """What the check says against a job with this command."""
    job = Job(name="sample", target="here", command=(program,))
    found = place.backend.check(job, options)
    assert all(remark.level == "fail" for remark in found)
    return tuple(remark.text for remark in found)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for stray in place.backend.strays("test", datetime.fromtimestamp(0, UTC)):
        place.backend.cancel(stray.handle)
        place.ended(stray.handle)


def has_become_sleep(pid: int) -> bool:
    """Whether the shell's child is what it is to be, and shows its variables again."""
    shown = Path(f"/proc/{pid}")
    return (shown / "comm").read_text() == "sleep\n" and (shown / "environ").read_bytes() != b""


def written_pid(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text().strip(), f"{path} is written"))


def outlive_shim(place: Place) -> int:
    """Launch a task whose shim and first process are dead; return the number of its child."""
    place.launch("k", f"sleep 100 & echo $! > {place.folder}/child; wait")
    child = written_pid(place.folder / "child")
    leader = place.record("k", "0", "process.json")["pid"]
    place.kill_shim("k")
    until(lambda: not is_alive(leader), "the leader dies with the shim, but not its child")
    return child


def python(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Another process with this package."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@contextmanager
def a_stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is nobody's business here."""
    with subprocess.Popen(["sleep", "100"], start_new_session=True) as stranger:
        try:
            yield stranger
        finally:
            stranger.kill()


LAUNCHER = """
import os, subprocess, sys
from datetime import timedelta
from pathlib import Path
from dispatcher.backends import local, local_shim
from dispatcher.backends.base import LaunchRequest, TaskInput

folder, key, script, point, local._BOOT = sys.argv[1:]
local.LAUNCH_SECONDS = 60.0
backend = local.LocalBackend("here", local.LocalSettings(spool=Path(folder) / "spool"))
request = LaunchRequest(
    key=key, instance="test", batch_id="b-1", job="job",
    command=("sh", "-c", 'echo run >> "$RUNS"; ' + script),
    tasks=(TaskInput(0, 10, 1, "[0]", env={"RUNS": folder + "/runs"}),),
    options=local.LocalOptions(), timeout=timedelta(minutes=5), parallelism=1,
)

def die(*_args, **_more):
    os.kill(os.getpid(), 9)

def before(module, name):
    setattr(module, name, die)

def after(module, name):
    real = getattr(module, name)
    def call(*args, **more):
        real(*args, **more)
        die()
    setattr(module, name, call)

{
    "nowhere": lambda: None,
    "before the request is written": lambda: before(local_shim, "write_json"),
    "before the rename": lambda: before(os, "rename"),
    "in the rename of the request": lambda: after(local_shim, "write_json"),
    "after the rename": lambda: before(os, "fsync"),
    "before the shim": lambda: before(subprocess, "Popen"),
    "after the shim": lambda: after(subprocess, "Popen"),
    "after the word": lambda: after(local, "_hear"),
    "after the launch": lambda: after(local, "_launched"),
}[point]()
print("ready", flush=True)
sys.stdin.readline()
backend.launch(request)
"""


def launcher_of(place: Place, key: str, script: str, point: str) -> subprocess.Popen[bytes]:
    """Another process that launches when it reads a line, and dies at a point of that."""
    return python(LAUNCHER, place.folder, key, script, point, local._BOOT)


POINTS = (
    "before the request is written",
    "in the rename of the request",
    "before the rename",
    "after the rename",
    "before the shim",
    "after the shim",
    "after the word",
    "after the launch",
)


class TestALaunchRunsOnce:
    @pytest.mark.parametrize("point", POINTS)
    def test_whenever_the_launcher_is_killed(self, place: Place, point: str) -> None:
        with launcher_of(place, "k", "true", point) as launcher:
            launcher.communicate(b"go\n")
        assert launcher.returncode == -signal.SIGKILL
        request = place.request("k")
        found = place.backend.find(request)
        launched = place.backend.launch(request)
        assert found in (None, launched)
        assert place.only_end("k").outcome is Outcome.SUCCEEDED
        assert place.backend.launch(request) == launched
        assert place.runs() == 1

    def test_when_two_processes_launch_it_at_the_same_time(self, place: Place) -> None:
        launchers = [
            launcher_of(place, key, "true", "nowhere")
            for key in ("k1", "k2", "k3")
            for _ in range(2)
        ]
        for launcher in launchers:
            assert launcher.stdout is not None
            launcher.stdout.readline()
        for launcher in launchers:
            assert launcher.stdin is not None
            launcher.stdin.write(b"go\n")
            launcher.stdin.flush()
        for launcher in launchers:
            launcher.communicate()
            assert launcher.returncode == 0
        for key in ("k1", "k2", "k3"):
            place.only_end(key)
        assert place.runs() == 3
        assert [p.name for p in place.spool.iterdir() if p.name.startswith(".")] == []

    def test_when_a_launcher_goes_on_after_a_long_stop(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = place.request("k")
        rename = os.rename

        def sleepy_rename(source: Any, target: Any) -> None:
            monkeypatch.setattr(os, "rename", rename)
            place.backend.launch(request)
            place.only_end("k")
            rename(source, target)

        monkeypatch.setattr(os, "rename", sleepy_rename)
        monkeypatch.setattr(local_shim, "write_json", _write_plainly)
        assert place.backend.launch(request).handle == "k"
        assert place.runs() == 1
        assert [p.name for p in place.spool.iterdir()] == ["k"]

    def test_while_another_shim_is_about_to_begin(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        boot = local._BOOT.replace("MARKER_SECONDS = 60.0", "MARKER_SECONDS = 0.1")
        monkeypatch.setattr(local, "_BOOT", boot)
        request = place.request("k")
        directory = place.spool / "k"
        place.backend._declare(request, directory)
        with python(
            """
            import fcntl, os, sys
            lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
            fcntl.flock(lock, fcntl.LOCK_EX)
            print("held", flush=True)
            sys.stdin.readline()
            """,
            directory / "lock",
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(Unavailable, match=r"another shim holds .* has not begun yet"):
                place.backend.launch(request)
            assert place.report("k").phase is Phase.PENDING
            holder.communicate(b"\n")
        place.backend.launch(request)
        place.only_end("k")
        assert place.runs() == 1


def _write_plainly(path: str, record: Any) -> None:
    Path(path).write_text(json.dumps(record))


SHIM = """
import os, sys
from dispatcher.backends import local_shim

directory, point = sys.argv[1:]
listen, answer = os.pipe()

def die(*_args):
    os.kill(os.getpid(), 9)

def mark_and_die(path, record):
    write_json(path, record)
    die()

def fork_and_die():
    if fork():
        die()
    return 0

write_json, fork = local_shim.write_json, os.fork
if point == "with the lock":
    local_shim.read_json = die
elif point == "before the mark":
    local_shim.write_json = die
elif point == "after the mark":
    local_shim.write_json = mark_and_die
elif point == "before the fork":
    os.fork = die
elif point == "after the fork":
    os.fork = fork_and_die
local_shim.supervise(directory, answer)
"""


class TestAShimThatDies:
    def run_shim(self, directory: Path, point: str) -> int:
        with python(SHIM, directory, point) as shim:
            shim.communicate()
        return shim.returncode

    @pytest.mark.parametrize("point", ["with the lock", "before the mark"])
    def test_before_its_mark_has_started_nothing_and_another_begins(
        self, place: Place, point: str
    ) -> None:
        request = place.request("k")
        place.backend._declare(request, place.spool / "k")
        assert self.run_shim(place.spool / "k", point) == -signal.SIGKILL
        assert place.report("k").phase is Phase.PENDING
        assert place.backend.find(request) is None
        place.backend.launch(request)
        assert place.only_end("k").outcome is Outcome.SUCCEEDED
        assert place.runs() == 1

    @pytest.mark.parametrize("point", ["after the mark", "before the fork", "after the fork"])
    def test_after_its_mark_is_never_replaced(self, place: Place, point: str) -> None:
        request = place.request("k", "sleep 100")
        place.backend._declare(request, place.spool / "k")
        assert self.run_shim(place.spool / "k", point) == -signal.SIGKILL
        assert place.backend.find(request) is not None
        place.backend.launch(request)
        end = place.only_end("k")
        assert end.outcome is Outcome.LOST
        assert re.fullmatch(
            r"its supervisor \(pid \d+\) vanished, and nothing of it runs any more",
            end.reason or "",
        )
        assert place.runs() <= (point == "after the fork")

    def test_that_nothing_stops_runs_the_task(self, place: Place) -> None:
        place.backend._declare(place.request("k"), place.spool / "k")
        assert self.run_shim(place.spool / "k", "nowhere") == 0
        assert place.only_end("k").outcome is Outcome.SUCCEEDED

    def test_takes_its_tasks_with_it_and_they_are_lost(self, place: Place) -> None:
        directory = place.launch("k", f"sleep 100 & echo $! > {place.folder}/child; wait")
        child = written_pid(place.folder / "child")
        leader = place.record("k", "0", "process.json")["pid"]
        place.kill_shim("k")
        end = place.only_end("k")
        assert end.outcome is Outcome.LOST
        assert not is_alive(leader)
        assert not is_alive(child)
        assert not (directory / "0" / "exit.json").exists()

    def test_loses_only_the_tasks_that_have_not_ended(self, place: Place) -> None:
        place.launch("k", '[ "$DISPATCH_TASK_INDEX" = 0 ] || sleep 100', tasks=2)
        until(lambda: place.report("k").tasks, "one has ended")
        place.kill_shim("k")
        assert {t.index: t.outcome for t in place.ended("k")} == {
            0: Outcome.SUCCEEDED,
            1: Outcome.LOST,
        }

    def test_is_not_mourned_before_its_last_process_is_gone(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        child = outlive_shim(place)
        until(lambda: has_become_sleep(child), "its child runs")
        kills: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", lambda pid, _signum: kills.append(pid))
            assert place.report("k").phase is Phase.RUNNING
        assert kills == [child]
        assert place.only_end("k").outcome is Outcome.LOST
        assert not is_alive(child)

    @pytest.mark.parametrize("has_variables", [True, False])
    def test_is_not_mourned_while_a_process_is_about_to_become_another_program(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, *, has_variables: bool
    ) -> None:
        """The system shows no variables of it then; of a process that was given none, never any."""
        child = outlive_shim(place)
        shown = place.folder / "proc" / str(child)
        shown.mkdir(parents=True)
        (shown / "environ").touch()
        name, _, rest = Path(f"/proc/{child}/stat").read_text().rpartition(")")
        fields = rest.split()
        fields[48] = "0" if has_variables else "140728365686763"  # where its variables end
        (shown / "stat").write_text(f"{name}) {' '.join(fields)}")
        with monkeypatch.context() as patch:
            patch.setattr(local, "_PROC", place.folder / "proc")
            assert place.report("k").phase is (Phase.RUNNING if has_variables else Phase.ENDED)
            assert is_alive(child)
        assert place.only_end("k").outcome is Outcome.LOST
        assert not is_alive(child)

    def test_asked_to_stop_stops_its_tasks_and_they_are_lost(self, place: Place) -> None:
        place.launch("k", "sleep 100")
        leader = place.record("k", "0", "process.json")["pid"]
        os.kill(place.record("k", "started.json")["pid"], signal.SIGTERM)
        end = place.only_end("k")
        assert (end.outcome, end.reason) == (
            Outcome.LOST,
            "its supervisor was told to stop (SIGTERM)",
        )
        assert not is_alive(leader)

    def test_that_cannot_read_its_request_says_so(self, place: Place) -> None:
        request = place.request("k")
        place.backend._declare(request, place.spool / "k")
        (place.spool / "k" / "request.json").write_text("{")
        with pytest.raises(Unavailable, match=r"could not begin: request\.json cannot be read"):
            place.backend.launch(request)
        assert place.report("k").phase is Phase.ABSENT
        assert place.backend.find(request) is not None, "it may have run before a power cut"

    def test_without_a_word_is_quoted_from_its_log(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dispatcher.backends.local._BOOT", "raise SystemExit('no such luck')")
        with pytest.raises(Unavailable, match="could not begin: no such luck"):
            place.launch("k")

    def test_that_is_silent_is_not_waited_for_for_ever(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dispatcher.backends.local.LAUNCH_SECONDS", 0.1)
        monkeypatch.setattr("dispatcher.backends.local._BOOT", "import time; time.sleep(60)")
        with pytest.raises(Unavailable, match=r"has not answered within 0\.1 s") as caught:
            place.launch("k")
        assert not caught.value.not_started


class TestARestartOfTheMachine:
    def test_loses_what_ran_and_kills_nobody_else(self, place: Place) -> None:
        place.launch("k", "exec sleep 100")
        place.kill_shim("k")
        with a_stranger() as stranger:
            start = local_shim.process_start(stranger.pid)
            place.rewrite("k", "0", "process.json", pid=stranger.pid, start=start)
            place.rewrite("k", "started.json", boot_id="another")
            end = place.only_end("k")
            assert end.outcome is Outcome.LOST
            assert end.reason == "the machine or container that it ran in was restarted"
            place.backend.cancel("k")
            assert stranger.poll() is None

    def test_loses_what_may_have_started_unmarked(self, place: Place) -> None:
        request = place.request("k")
        place.backend._declare(request, place.spool / "k")
        place.rewrite("k", "request.json", boot_id="another")
        launched = place.backend.launch(request)
        assert place.backend.find(request) == launched
        end = place.only_end("k")
        assert end.outcome is Outcome.LOST
        assert end.reason == "the machine was restarted around its start"
        assert place.runs() == 0

    def test_of_a_container_loses_what_ran_in_it(self, place: Place) -> None:
        place.launch("k", "exec sleep 100")
        place.kill_shim("k")
        place.rewrite("k", "started.json", pid_ns="another")
        assert place.only_end("k").outcome is Outcome.LOST

    def test_changes_nothing_of_what_had_ended(self, place: Place) -> None:
        place.run("k", "true")
        place.rewrite("k", "started.json", boot_id="another")
        assert place.only_end("k").outcome is Outcome.SUCCEEDED

    def test_leaves_a_pid_that_went_to_another_process_alone(self, place: Place) -> None:
        place.launch("k", "exec sleep 100")
        place.kill_shim("k")
        with a_stranger() as stranger:
            place.rewrite("k", "0", "process.json", pid=stranger.pid, start="1")
            assert place.only_end("k").outcome is Outcome.LOST
            assert stranger.poll() is None


class TestALaunchedExecution:
    def test_survives_the_death_of_its_launcher(self, place: Place) -> None:
        script = f"until [ -e {place.folder}/go ]; do sleep 0.01; done"
        with launcher_of(place, "k", script, "after the launch") as launcher:
            launcher.communicate(b"go\n")
        assert place.report("k").phase is Phase.RUNNING
        (place.folder / "go").touch()
        assert place.only_end("k").outcome is Outcome.SUCCEEDED

    def test_is_nobodys_child(self, place: Place) -> None:
        place.launch("k", "sleep 100")
        pid = place.record("k", "started.json")["pid"]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        parent, session = int(fields[1]), int(fields[3])
        assert parent != os.getpid()
        assert session != os.getsid(0)

    def test_runs_at_most_so_many_tasks_at_once(self, place: Place) -> None:
        marks = place.folder / "marks"
        second = f'until [ "$(grep -c + {marks})" -ge 2 ]; do sleep 0.01; done'
        script = f"echo + >> {marks}; {second}; sleep 0.1; echo - >> {marks}"
        place.launch("k", script, tasks=6, parallelism=2)
        assert len(place.ended("k")) == 6
        count = peak = 0
        for mark in marks.read_text().split():
            count += 1 if mark == "+" else -1
            peak = max(peak, count)
        assert (count, peak) == (0, 2)

    def test_ends_with_the_processes_that_a_task_leaves_behind(self, place: Place) -> None:
        assert place.run("k", f"sleep 100 & echo $! > {place.folder}/child").exit_code == 0
        child = written_pid(place.folder / "child")
        until(lambda: not is_alive(child), "it is killed")

    def test_whose_directory_is_removed_ends_its_tasks(self, place: Place) -> None:
        directory = place.launch("k", "sleep 100")
        leader = place.record("k", "0", "process.json")["pid"]
        shim = place.record("k", "started.json")["pid"]
        directory.rename(place.folder / "elsewhere")
        with suppress(ProcessLookupError):  # it looks by itself every few seconds
            os.kill(shim, signal.SIGUSR1)
        until(lambda: not is_alive(leader) and not is_alive(shim), "both end")
        assert place.report("k").phase is Phase.ABSENT

    def test_killed_by_a_signal_failed_with_its_number(self, place: Place) -> None:
        end = place.run("k", "kill -9 $$")
        assert (end.outcome, end.exit_code) == (Outcome.FAILED, 137)
        assert end.reason == "killed by signal 9 (SIGKILL)"
        end = place.run("k2", "kill -40 $$")
        assert (end.exit_code, end.reason) == (168, "killed by signal 40 (a real-time signal)")

    def test_that_ignores_a_cancel_is_killed_after_the_grace(self, tmp_path: Path) -> None:
        place = Place(tmp_path, stop_grace=0.1)
        place.launch("k", f"trap '' TERM; touch {place.folder}/up; while :; do sleep 1; done")
        until((place.folder / "up").exists, "the trap is set")
        place.backend.cancel("k")
        end = place.only_end("k")
        assert (end.outcome, end.exit_code) == (Outcome.CANCELLED, 137)

    def test_that_exits_well_when_cancelled_is_cancelled_all_the_same(self, place: Place) -> None:
        script = f"trap 'exit 0' TERM; touch {place.folder}/up; while :; do sleep 0.01; done"
        place.launch("k", script)
        until((place.folder / "up").exists, "the trap is set")
        place.backend.cancel("k")
        end = place.only_end("k")
        assert (end.outcome, end.exit_code) == (Outcome.CANCELLED, 0)

    def test_that_is_cancelled_cancels_the_tasks_that_wait(self, place: Place) -> None:
        place.launch("k", "sleep 100", tasks=3, parallelism=1)
        until(lambda: place.runs() == 1, "the first runs")
        place.backend.cancel("k")
        assert [(t.index, t.outcome, t.reason) for t in place.ended("k")] == [
            (0, Outcome.CANCELLED, "cancelled"),
            (1, Outcome.CANCELLED, "cancelled before it started"),
            (2, Outcome.CANCELLED, "cancelled before it started"),
        ]
        assert place.runs() == 1

    def test_cancelled_before_its_shim_never_runs(self, place: Place) -> None:
        request = place.request("k", tasks=2)
        place.backend._declare(request, place.spool / "k")
        place.backend.cancel("k")
        before = place.ended("k")
        assert [(t.outcome, t.reason) for t in before] == [
            (Outcome.CANCELLED, "cancelled before it started")
        ] * 2
        place.backend.launch(request)
        after = place.ended("k")
        assert [(t.outcome, t.reason) for t in after] == [(t.outcome, t.reason) for t in before]
        assert place.runs() == 0

    def test_times_out_with_the_limit_in_the_reason(self, place: Place) -> None:
        end = place.run("k", "sleep 100", timeout=timedelta(seconds=0.5))
        assert (end.outcome, end.exit_code) == (Outcome.TIMED_OUT, 143)
        assert end.reason == "ran longer than its timeout of 0.5 s"


class TestATask:
    def environment(self, place: Place, key: str = "k", **more: Any) -> dict[str, str]:
        place.launch(key, "env -0", **more)
        place.only_end(key)
        pairs = (place.spool / key / "0" / "stdout").read_text().rstrip("\0").split("\0")
        return dict(pair.split("=", 1) for pair in pairs)

    def test_learns_who_it_is(self, place: Place) -> None:
        request = place.request("k")
        (task,) = request.tasks
        env = self.environment(place)
        folder = place.spool / "k" / "0"
        assert {name: value for name, value in env.items() if name.startswith("DISPATCH")} == {
            "DISPATCH_KEY": "k",
            "DISPATCH_BATCH_ID": "b-1",
            "DISPATCH_ATTEMPT": str(task.attempt),
            "DISPATCH_TASK_COUNT": "1",
            "DISPATCH_TASK_INDEX": "0",
            "DISPATCH_RESULT_URI": (folder / "result.json").as_uri(),
            "DISPATCH_ITEMS": "[0]",
        }

    def test_inherits_the_environment_but_not_the_settings(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLOUR", "grün")
        monkeypatch.setenv("DISPATCHER_DATABASE_URL", "postgresql://secret")
        monkeypatch.setenv("DISPATCH_INPUT_URI", "of the worker's own chunk")
        env = self.environment(place)
        assert env["COLOUR"] == "grün"
        assert "DISPATCHER_DATABASE_URL" not in env
        assert "DISPATCH_INPUT_URI" not in env

    @pytest.mark.parametrize(
        ("inherit", "seen"), [(("COLOUR",), True), ((), False), (False, False)]
    )
    def test_inherits_only_what_is_listed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherit: Any, *, seen: bool
    ) -> None:
        monkeypatch.setenv("COLOUR", "green")
        monkeypatch.setenv("TASTE", "sweet")
        env = self.environment(Place(tmp_path, inherit_env=inherit))
        assert env["PATH"] == os.environ["PATH"]
        assert ("COLOUR" in env) is seen
        assert "TASTE" not in env

    def test_has_its_own_arguments_and_environment(self, place: Place) -> None:
        request = place.request("k", 'echo "$1 $WHO"')
        (task,) = request.tasks
        task = replace(task, args=("hello",), env={**task.env, "WHO": "w'örld"})
        place.backend.launch(replace(request, tasks=(task,)))
        place.only_end("k")
        assert place.logs("k") == ["hello w'örld"]

    def test_runs_where_the_job_says(self, place: Place) -> None:
        folder = place.folder / "work"
        folder.mkdir()
        place.run("k", "pwd", options=LocalOptions(cwd=str(folder)))
        assert place.logs("k") == [str(folder)]
        place.run("k2", "pwd")
        assert place.logs("k2") == [str(Path.cwd())]

    def test_gets_many_items_as_a_file(self, place: Place) -> None:
        items = json.dumps(["ö" * 100] * 1000, ensure_ascii=False)
        assert len(items.encode()) > 64 * 1024
        request = place.request("k", 'echo "$DISPATCH_INPUT_URI"; [ -z "${DISPATCH_ITEMS+x}" ]')
        tasks = (replace(request.tasks[0], items=items),)
        place.backend.launch(replace(request, tasks=tasks))
        assert place.only_end("k").outcome is Outcome.SUCCEEDED
        (uri,) = place.logs("k")
        assert Path(urlparse(uri).path).read_text() == items

    def test_gets_up_to_64_kib_of_items_in_a_variable(self, place: Place) -> None:
        request = place.request("k", 'printf %s "$DISPATCH_ITEMS" | wc -c')
        tasks = (replace(request.tasks[0], items=json.dumps("x" * (64 * 1024 - 2))),)
        place.backend.launch(replace(request, tasks=tasks))
        place.only_end("k")
        assert place.logs("k") == [str(64 * 1024)]

    def test_that_writes_a_result_is_reported_with_it(self, place: Place) -> None:
        end = place.run("k", 'echo {} > "${DISPATCH_RESULT_URI#file://}"')
        assert end.result_uri == (place.spool / "k" / "0" / "result.json").as_uri()
        assert place.run("k2", "true").result_uri is None

    def test_writes_its_result_to_the_storage_where_there_is_one(self, place: Place) -> None:
        store = place.folder / "store"
        store.mkdir()
        script = 'echo "$DISPATCH_ITEMS" > "${DISPATCH_RESULT_URI#file://}"'
        place.launch("k", script, tasks=2, result_uri=f"{store.as_uri()}/")
        assert [task.result_uri for task in place.ended("k")] == [None, None]
        assert [(store / f"{i}.json").read_text() for i in (0, 1)] == ["[0]\n", "[1]\n"]

    def test_starts_with_ordinary_signals_and_no_open_files(self, place: Place) -> None:
        script = "grep -E '^Sig(Blk|Ign):' /proc/self/status; ls /proc/$$/fd; true"
        place.run("k", script)
        blocked, ignored, *files = place.logs("k")
        # Of the ordinary signals, 1 to 31: a thread library's own above them are inherited.
        masks = [int(line.split()[1], 16) & 0x7FFFFFFF for line in (blocked, ignored)]
        assert masks == [0, 0]
        assert files == list("012")


class TestACommandThatCannotRun:
    def refusal(self, place: Place, *command: str, cwd: str | None = None) -> str:
        key = f"k{time.monotonic_ns()}"
        options = LocalOptions(cwd=cwd)
        place.launch(key, command=command, options=options)
        end = place.only_end(key)
        assert (end.outcome, end.exit_code) == (Outcome.REJECTED, None)
        assert end.reason is not None
        return end.reason

    def test_is_refused_when_it_is_not_found(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        reason = self.refusal(place, "no-such-program")
        assert reason == (
            "command not found: 'no-such-program' is in no directory of PATH (/usr/bin:/bin);"
            " correct the job's 'command', give its full path, or set PATH in the job's 'env'"
        )
        assert remarks(place, LocalOptions(), "no-such-program") == (reason,)

    def test_is_refused_when_its_path_is_wrong(self, place: Place) -> None:
        missing = place.folder / "missing"
        reason = f"command not found: there is no file '{missing}'; correct the job's 'command'"
        assert self.refusal(place, str(missing)) == reason
        assert self.refusal(place, "./missing", cwd=str(place.folder)) == reason.replace(
            "/missing", "/./missing"
        )

    def test_is_refused_when_it_may_not_be_executed(self, place: Place) -> None:
        script = place.folder / "script"
        script.write_text("#!/bin/sh\n")
        reason = self.refusal(place, str(script))
        assert reason == (
            f"command not executable: '{script}' is a file that may not be executed;"
            " make it executable (chmod +x) or name its interpreter in the job's 'command'"
        )
        assert remarks(place, LocalOptions(), str(script)) == (reason,)

    def test_is_refused_when_its_folder_is_missing(self, place: Place) -> None:
        missing = str(place.folder / "missing")
        reason = self.refusal(place, "true", cwd=missing)
        assert (
            reason
            == f"cwd not found: '{missing}' is no directory; correct 'cwd' in the job's options"
        )
        assert remarks(place, LocalOptions(cwd=missing), "true") == (reason,)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("#!/no/such/interpreter\n", "the interpreter of its '#!' line does not exist"),
            ("no program\n", "it is no program and has no '#!' line"),
        ],
    )
    def test_is_refused_when_the_system_cannot_run_it(
        self, place: Place, text: str, reason: str
    ) -> None:
        script = place.folder / "script"
        script.write_text(text)
        script.chmod(stat.S_IRWXU)
        assert self.refusal(place, str(script)) == f"command cannot be run: '{script}': {reason}"

    def test_is_refused_when_its_arguments_are_impossible(self, place: Place) -> None:
        assert self.refusal(place, "/bin/echo", "a\0b").endswith(
            "an argument or a variable holds a NUL byte"
        )
        assert self.refusal(place, "/bin/echo", "x" * 200_000).endswith(
            "its arguments and environment are too big for this system"
        )

    def test_is_found_on_the_path_that_tasks_have(self, place: Place) -> None:
        assert remarks(place, LocalOptions(), "sh") == ()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"command": ()}, "no command"),
            ({"key": "../k"}, "does not match"),
            ({"tasks": ()}, "0 tasks; 1 to 1000 are allowed"),
        ],
    )
    def test_is_rejected_at_once_when_the_request_is_wrong(
        self, place: Place, change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(Rejected, match=message):
            place.backend.launch(replace(place.request("k"), **change))

    def test_is_rejected_when_its_items_are_too_big(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits = replace(place.backend.limits, max_payload_bytes=2)
        monkeypatch.setattr("dispatcher.backends.local.LIMITS", limits)
        with pytest.raises(
            Rejected, match="the items of chunk 10 are 3 bytes of JSON; 2 are allowed"
        ):
            place.launch("k")

    def test_that_finds_no_room_is_a_failed_start(self, place: Place) -> None:
        request = place.request("k")
        place.backend._declare(request, place.spool / "k")
        (place.spool / "k" / "0").write_text("in the way of the task's folder")
        place.backend.launch(request)
        until(lambda: "exit of task 0" in (place.spool / "k" / "shim.log").read_text(), "it tries")
        assert place.report("k").phase is Phase.RUNNING, "its end cannot be written yet"
        (place.spool / "k" / "0").unlink()
        end = place.only_end("k")
        assert end.outcome is Outcome.START_FAILED
        assert (end.reason or "").startswith("could not be started: ")


class TestOutput:
    def test_is_kept_up_to_a_limit_the_beginning_and_the_newest(self, tmp_path: Path) -> None:
        place = Place(tmp_path, max_log_bytes=64 * 1024)
        assert place.run("k", "seq 1 100000").outcome is Outcome.SUCCEEDED
        files = list((place.spool / "k" / "0").glob("stdout*"))
        assert sum(file.stat().st_size for file in files) <= 64 * 1024
        lines = place.logs("k", 1_000_000)
        assert lines[:3] == ["1", "2", "3"]
        assert lines[-2:] == ["99999", "100000"]
        assert "--- some output is left out here: it was over max_log_bytes ---" in lines
        assert place.logs("k", 2) == ["99999", "100000"]
        assert place.logs("k", 3000) == [str(n) for n in range(97001, 100001)]

    def test_is_whole_below_the_limit(self, tmp_path: Path) -> None:
        place = Place(tmp_path, max_log_bytes=4096)
        place.run("k", "seq 1 700")
        assert place.logs("k", 1000) == [str(n) for n in range(1, 701)]

    def test_shows_both_streams(self, place: Place) -> None:
        place.run("k", "echo out; echo err >&2")
        assert place.logs("k") == ["out", "--- stderr ---", "err"]
        place.run("k2", "echo err >&2")
        assert place.logs("k2") == ["err"]

    def test_may_be_no_text_and_have_no_line_end(self, place: Place) -> None:
        place.run("k", r"printf 'a\377b\r\n\n\302\205c'")
        assert place.logs("k") == ["a\N{REPLACEMENT CHARACTER}b", "", "\x85c"]

    def test_is_seen_while_the_task_runs(self, place: Place) -> None:
        place.launch("k", "echo early; sleep 100")
        until(lambda: place.logs("k") == ["early"], "the line is there")

    def test_that_cannot_be_kept_does_not_stop_the_task(self, tmp_path: Path) -> None:
        pump = local_shim.Pump(str(tmp_path / "stdout"), 4096)
        os.close(pump._file)
        pump._file = os.open("/dev/full", os.O_WRONLY)
        os.write(pump.sink, b"lost")
        assert pump.copy()
        os.close(pump.sink)
        assert pump.error == "some output could not be kept: No space left on device"
        pump.close()

    def test_that_was_lost_is_told_with_the_end(self, place: Place) -> None:
        place.run("k", "exit 3")
        place.rewrite("k", "0", "exit.json", output="some output could not be kept: full")
        end = place.only_end("k")
        assert (end.exit_code, end.reason) == (3, "some output could not be kept: full")


class TestTheSpool:
    def test_that_cannot_be_written_is_unavailable(self, place: Place) -> None:
        place.spool.write_text("a file")
        with pytest.raises(Unavailable, match="cannot launch in the spool") as caught:
            place.launch("k")
        assert caught.value.not_started
        place.spool.unlink()

    def test_that_is_not_there_holds_nothing(self, place: Place) -> None:
        assert place.backend.find(place.request("k")) is None
        assert place.report("k").phase is Phase.ABSENT
        assert list(place.backend.strays("test", datetime.fromtimestamp(0, UTC))) == []
        assert place.backend.clean(datetime.now(UTC)) == 0

    def test_may_be_named_from_where_the_worker_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        backend = LocalBackend("here", LocalSettings())
        monkeypatch.chdir("/")
        assert backend._spool == tmp_path / ".dispatcher" / "spool"

    def test_is_for_its_owner_only(self, place: Place) -> None:
        place.run("k", "true")
        for path in (place.spool, place.spool / "k"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700

    def test_is_cleaned_of_what_ended_long_ago(self, place: Place) -> None:
        place.run("old", "true")
        place.launch("running", "sleep 100")
        place.backend._declare(place.request("unstarted"), place.spool / "unstarted")
        (place.spool / ".new-scrap").mkdir()
        hour = timedelta(hours=1)
        keep = place.backend.settings.keep
        assert place.backend.clean(datetime.now(UTC) + keep - hour) == 0
        assert place.report("old").phase is Phase.ENDED
        assert place.backend.clean(datetime.now(UTC) + keep + hour) == 1
        assert {path.name for path in place.spool.iterdir()} == {"running", "unstarted"}
        assert place.report("old").phase is Phase.ABSENT
        assert place.report("running").phase is Phase.RUNNING

    def test_names_its_home(
        self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine = tmp_path / "machine-id"
        monkeypatch.setattr("dispatcher.backends.local._MACHINE_ID", machine)
        assert set(place.backend.home()) == {"host", "boot_id", "pid_ns"}
        machine.write_text("0123abcd\n")
        home = place.backend.home()
        assert set(home) == {"host", "boot_id", "pid_ns", "machine"}
        assert home["machine"] == "0123abcd"
        assert home["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert home["pid_ns"].startswith("pid:[")

    @pytest.mark.parametrize("keep", ["59m", "0.5s"])
    def test_keeps_what_ended_for_an_hour_at_least(self, keep: str) -> None:
        with pytest.raises(ValidationError, match=f"must be 1h or longer, not {keep}: a directory"):
            LocalSettings.model_validate({"keep": keep})
        assert LocalSettings.model_validate({"keep": "1h"}).keep == timedelta(hours=1)

    def test_with_unreadable_directories_tells_of_all_others(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # One that nobody has used yet: else it may keep how it logged in the test of a command.
        monkeypatch.setattr(local, "log", structlog.get_logger())
        place.run("good", "true")
        for key in ("folder", "odd", "list"):
            place.run(key, "true")
        (place.spool / "folder" / "started.json").unlink()
        (place.spool / "folder" / "started.json").mkdir()
        (place.spool / "odd" / "started.json").write_text('{"pid": 1}')
        place.rewrite("list", "0", "exit.json", started_at=5)
        keys = ["folder", "good", "odd", "list", "unknown"]
        with capture_logs() as every:
            reports = place.backend.poll(keys)
            assert list(place.backend.strays("test", datetime.fromtimestamp(0, UTC))) == []
            later = datetime.now(UTC) + timedelta(days=8)
            assert {key: r.phase for key, r in reports.items()} == {
                "good": Phase.ENDED,
                "unknown": Phase.ABSENT,
            }
            assert place.backend.clean(later) == 1
        logs = [entry for entry in every if entry.get("target") == "here"]
        assert [entry["handle"] for entry in logs[:3]] == ["folder", "odd", "list"]
        assert {entry["log_level"] for entry in logs} == {"warning"}
        assert logs[1]["why"] == "KeyError: 'started_at'"
        assert {path.name for path in place.spool.iterdir()} == {"folder", "odd", "list"}

    def test_that_cannot_be_read_is_unavailable(self, place: Place) -> None:
        place.spool.write_text("a file")
        with pytest.raises(Unavailable, match="cannot read the spool"):
            place.report("k")
        place.spool.unlink()

    def test_has_nothing_to_find_that_comes_into_place_at_this_moment(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = place.request("k")
        read = local_shim.read_json

        def read_before_the_rename(path: str) -> dict[str, Any] | None:
            record = read(path)
            if not (place.spool / "k").exists():
                place.backend._declare(request, place.spool / "k")
            return record

        monkeypatch.setattr(local_shim, "read_json", read_before_the_rename)
        assert place.backend.find(request) is None
        place.backend._declare(request, place.spool / "k")
        assert place.backend.find(request) is None, "it is there and was never started"

    def test_takes_only_its_own_settings(self) -> None:
        with pytest.raises(TypeError, match="not LocalSettings"):
            LocalBackend("here", LocalOptions())


class TestWithoutProc:
    """What is left to a system that has no /proc, such as macOS."""

    def test_a_process_is_known_by_ps(self) -> None:
        assert local_shim._start_by_ps(os.getpid())
        assert local_shim._start_by_ps(2**22 + 1) is None

"""Programs as they run in containers: real processes, ended in every way, and what they leave.

The protocol of docs/container.md is spoken by the helper, by its wrapper, and by the examples in
Node.js and in POSIX shell; the same tests hold for each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from buckets import serve_gcs, serve_s3
from google_emulators import INSTALLED, run_emulators, serve_front
from waiting import until

from dispatcher import container
from dispatcher.receipts import Expected, read_receipt

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "container"
HELPER = Path(container.__file__)

DOCUMENT = (
    '{"chunk":12,"attempt":1,"items":["a","b"]}\n'
    '{"chunk":40,"attempt":3,"items":["c","d d","e"],'
    '"args":["--all"],"env":{"IDS":"c,d d,e"}}\n'
)

node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here")
jq = pytest.mark.skipif(shutil.which("jq") is None, reason="there is no jq here")
curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")


class Container:
    """A directory with the copied helper, and the environment that a platform would give."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "image").mkdir()
        for file in (HELPER, EXAMPLES / "receipt.mjs", EXAMPLES / "receipt.sh"):
            shutil.copy(file, path / "image")
        (path / "input.jsonl").write_text(DOCUMENT)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(path),
            "DISPATCH_KEY": "k1",
            "DISPATCH_INPUT_URI": (path / "input.jsonl").as_uri(),
            "DISPATCH_RESULT_URI": f"{path.as_uri()}/results/k1/",
            "CLOUD_RUN_TASK_INDEX": "1",
            "CLOUD_RUN_EXECUTION": "job-abc",
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            cwd=self.path / "image",
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def python(self, program: str, interpreter: str = sys.executable) -> subprocess.Popen[str]:
        return self.start(interpreter, "-I", "-c", f"import sys\nsys.path.insert(0, '')\n{program}")

    def wrapper(self, *words: str) -> subprocess.Popen[str]:
        return self.start(sys.executable, "container.py", "exec", *words)

    def shell(self, program: str) -> subprocess.Popen[str]:
        return self.start("sh", "-c", f". ./receipt.sh\n{program}")

    def node(self, work: str) -> subprocess.Popen[str]:
        (self.path / "image" / "main.mjs").write_text(
            f'import {{ run }} from "./receipt.mjs";\nawait run({work});\n'
        )
        return self.start("node", "main.mjs")

    def speaking(self, language: str) -> subprocess.Popen[str]:
        """Start a program that does nothing and succeeds with every item."""
        if language == "node":
            return self.node("() => null")
        if language == "shell":
            return self.shell("dispatch_each true")
        return self.wrapper("--each", "true")

    def bound_node(self, most: int) -> None:
        """Let a receipt by Node.js have fewer bytes."""
        bound = "MAX_RECEIPT_BYTES = 16 << 20;"
        self.change("receipt.mjs", bound, f"MAX_RECEIPT_BYTES = {most};")

    def change(self, name: str, old: str, new: str) -> None:
        """Change a line of a file of the image."""
        path = self.path / "image" / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def receipt(self, name: str = "1.json") -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.path / "results" / "k1" / name).read_text()))
        except FileNotFoundError:
            return None

    def kept(self) -> list[dict[str, Any]] | None:
        """Give the items of the receipt in progress; there must be no complete one."""
        assert self.receipt() is None
        found = self.receipt("1.progress.json")
        if found is None:
            return None
        assert found["complete"] is False
        return list(found["items"])

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.path / "results" / "k1").glob("*"))


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Container]:
    made = Container(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


WORK = """
import container, time
with container.run() as task:
    for item in task.items:
        task.report(item, ok=item != "c", output=item, error="bad" if item == "c" else None)
        if item == "d d":
            {}
"""


class TestAProgram:
    def test_that_ends_in_order_leaves_a_complete_receipt(self, box: Container) -> None:
        assert ended(box.python(WORK.format("pass"))) == (0, "", "")
        found = box.receipt()
        assert found is not None
        assert (found["complete"], found["chunk"], found["attempt"]) == (True, 40, 3)
        assert found["items"] == [
            {"i": 0, "ok": False, "output": "c", "error": "bad"},
            {"i": 1, "ok": True, "output": "d d"},
            {"i": 2, "ok": True, "output": "e"},
        ]
        assert set(box.files()) - {"1.progress.json"} == {"1.json"}

    @pytest.mark.parametrize(
        ("end", "code"), [("raise OSError('no')", 1), ("sys.exit(7)", 7), ("sys.exit('no')", 1)]
    )
    def test_that_ends_badly_leaves_what_it_did(self, end: str, code: int, box: Container) -> None:
        assert ended(box.python(WORK.format(end)))[0] == code
        assert [entry["i"] for entry in box.kept() or []] == [0, 1]

    def test_that_is_killed_hard_leaves_what_it_did_until_seconds_ago(self, box: Container) -> None:
        process = box.python(
            "import container; container.PROGRESS_SECONDS = 0.05\n"
            + WORK.format("print('there', flush=True); time.sleep(600)")
        )
        until(box.kept)
        until(lambda: len(box.kept() or []) == 2)
        process.kill()
        ended(process)
        assert [entry["i"] for entry in box.kept() or []] == [0, 1]

    def test_that_is_told_to_stop_leaves_what_it_did_and_exits_with_143(
        self, box: Container
    ) -> None:
        process = box.python(
            WORK.format(
                """
            try:
                print("there", flush=True)
                time.sleep(600)
            finally:
                print("cleaned up")
"""
            )
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (143, "cleaned up\n", "")
        assert [entry["i"] for entry in box.kept() or []] == [0, 1]

    @pytest.mark.parametrize(
        "program",
        [
            "with container.run() as task:\n    for i in task.items: task.report(i, True)",
            "for i in container.items(): container.report(i, True)",
        ],
        ids=["with a block", "without a block"],
    )
    def test_that_is_told_to_stop_while_it_writes_its_receipt_leaves_what_it_did(
        self, program: str, box: Container
    ) -> None:
        with serve_gcs() as gcs:
            gcs.unavailable = "results/k1/1.json"
            box.env["STORAGE_EMULATOR_HOST"] = gcs.url
            box.env["DISPATCH_RESULT_URI"] = "gs://bucket/results/k1/"
            process = box.python(f"import container\ncontainer.PAUSES = (600,)\n{program}")
            until(lambda: any("results%2Fk1%2F1.json" in path for _, path, _ in gcs.seen))
            process.send_signal(signal.SIGTERM)
            assert ended(process) == (143, "", "")
            found = json.loads(gcs.objects["results/k1/1.progress.json"])
            assert (found["complete"], len(found["items"])) == (False, 3)

    @pytest.mark.parametrize("signed", [False, True])
    def test_told_to_stop_while_it_writes_its_receipt_a_wrapper_writes_what_it_can(
        self, signed: bool, box: Container
    ) -> None:
        with serve_gcs() as gcs:
            gcs.unavailable = "results/k1/1.json"
            box.env["STORAGE_EMULATOR_HOST"] = gcs.url
            box.env["DISPATCH_RESULT_URI"] = (
                f"{gcs.url}/bucket/results/k1/" if signed else "gs://bucket/results/k1/"
            )
            # It tries again until the test lets it, however long that takes.
            box.change("container.py", "PAUSES = (0.3, 1.0, 3.0)", "PAUSES = (0.1,) * 600")
            process = box.wrapper("--each", "true")
            until(
                lambda: any("k1%2F1.json" in path or "k1/1.json" in path for _, path, _ in gcs.seen)
            )
            process.send_signal(signal.SIGTERM)
            if not signed:
                until(lambda: b'"i":2' in gcs.objects.get("results/k1/1.progress.json", b""))
            gcs.unavailable = ""
            # It had done all that it was to do.
            assert ended(process) == (0, "", "")
            assert json.loads(gcs.objects["results/k1/1.json"])["complete"]

    def test_whose_claim_is_lost_does_nothing(self, box: Container) -> None:
        box.env["DISPATCH_CLAIM_URI"] = (box.path / "claims" / "k1").as_uri()
        (box.path / "claims").mkdir()
        (box.path / "claims" / "k1").write_text("job-other")
        code, out, err = ended(box.python("print('begun')\n" + WORK.format("pass")))
        assert (code, out) == (94, "begun\n")
        assert "belongs to execution job-other, and this is job-abc" in err
        assert box.files() == []

    def test_without_a_block_leaves_its_receipt_when_it_exits(self, box: Container) -> None:
        plain = "import container\nfor i in container.items(): container.report(i, True)\n{}"
        assert ended(box.python(plain.format("raise OSError")))[0] == 1
        assert len(box.kept() or []) == 3
        assert ended(box.python(plain.format("")))[0] == 0
        found = box.receipt()
        assert found is not None
        assert found["complete"]

    def test_without_a_block_keeps_what_it_did_when_it_is_told_to_stop(
        self, box: Container
    ) -> None:
        process = box.python(
            "import container, time; container.report_at(1, True)\n"
            "print('there', flush=True); time.sleep(600)"
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143
        assert box.kept() == [{"i": 1, "ok": True}]

    def test_whose_receipt_cannot_be_written_does_not_exit_with_0(self, box: Container) -> None:
        (box.path / "results").touch()
        plain = "import container\nfor i in container.items(): container.report(i, True)\n"
        code, _, err = ended(box.python(plain))
        assert code == 1
        assert "the receipt cannot be written: cannot write file://" in err
        assert ended(box.python(WORK.format("pass")))[0] == 1

    def test_that_can_tell_nobody_of_its_failures_exits_with_1(self, box: Container) -> None:
        del box.env["DISPATCH_RESULT_URI"]
        code, _, err = ended(box.python(WORK.format("pass")))
        assert code == 1
        assert "items failed, and there is no DISPATCH_RESULT_URI to say so at" in err
        assert ended(box.python("import container; container.report_at(0, False)"))[0] == 1

    def test_that_has_no_place_for_a_receipt_names_the_items_that_failed(
        self, box: Container
    ) -> None:
        del box.env["DISPATCH_RESULT_URI"]
        box.env["DISPATCH_ITEMS"] = json.dumps(["a", {"b": 1}, *range(10)])
        fails = "import container\nfor item in container.items(): container.report(item, False, "
        _, _, err = ended(box.python(fails + "error='no\\nway')"))
        assert 'say so at:\n  item 0 ("a"): no way\n  item 1 ({"b":1}): no way\n' in err
        assert err.endswith("  item 9 (7): no way\n  and 2 more\n")
        code, _, err = ended(box.wrapper("--each", "--", "false"))
        assert code == 1
        assert 'say so at:\n  item 0 ("a"): exit code 1\n' in err
        if shutil.which("node"):
            code, _, err = ended(box.node("() => { throw new Error('no way') }"))
            assert (code, err.splitlines()[0]) == (1, "item 0: Error: no way")
        box.env["DISPATCH_ITEMS"] = "[7, 8]"
        code, _, err = ended(box.shell("dispatch_each false"))
        assert code == 1
        assert err == "receipt.sh: item 0: exit code 1\nreceipt.sh: item 1: exit code 1\n"

    def test_its_forked_children_write_nothing(self, box: Container) -> None:
        program = """
import container, multiprocessing, os, signal
context = multiprocessing.get_context("fork")
with container.run() as task:
    with context.Pool(2) as pool:
        done = pool.map(str.upper, task.items)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    for item, output in zip(task.items, done):
        task.report(item, True, output)
"""
        assert ended(box.python(program))[:2] == (0, "")
        assert box.files() == ["1.json", "1.progress.json"]
        (box.path / "results" / "k1" / "1.json").unlink()
        program = """
import container, os
container.report_at(0, True)
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
container.report_at(1, True)
container.report_at(2, True)
"""
        assert ended(box.python(program))[:2] == (0, "")
        assert box.files() == ["1.json", "1.progress.json"]


class TestTheWrapper:
    def test_gives_the_command_its_line_and_becomes_it(self, box: Container) -> None:
        program = "echo $$ $* $IDS $DISPATCH_ITEMS $DISPATCH_ATTEMPT $DISPATCH_CHUNK; kill -9 $$"
        process = box.wrapper("--", "sh", "-c", program, "name", "own")
        code, out, err = ended(process)
        assert (code, err) == (-signal.SIGKILL, "")
        assert out == f'{process.pid} own --all c,d d,e ["c","d d","e"] 3 40\n'
        assert box.files() == []

    def test_leaves_the_command_the_signals_that_python_ignores(self, box: Container) -> None:
        assert ended(box.wrapper("--", "sh", "-c", "yes | head -n 1")) == (0, "y\n", "")

    def test_hands_items_on_in_a_file_where_a_variable_cannot_hold_them(
        self, box: Container
    ) -> None:
        line = json.dumps({"items": ["x" * 1000] * 200})
        (box.path / "input.jsonl").write_text(f"{line}\n{line}\n")
        box.env["TMPDIR"] = str(box.path)
        program = (
            "import container, os; print(len(container.items()), 'DISPATCH_ITEMS' in os.environ)"
        )
        process = box.wrapper(sys.executable, "-c", program)
        assert ended(process) == (0, "200 False\n", "")

    def test_refuses_a_variable_that_linux_would_not_take(self, box: Container) -> None:
        line = json.dumps({"items": [1], "env": {"IDS": "x" * 140_000}})
        (box.path / "input.jsonl").write_text(f"{line}\n{line}\n")
        code, _, err = ended(box.wrapper("true"))
        assert code == 65
        assert "the variable IDS would have 140,000 bytes, and Linux takes 128 KiB" in err

    def test_says_by_its_exit_code_what_was_wrong(self, box: Container) -> None:
        assert ended(box.wrapper())[0] == 64
        assert ended(box.wrapper("--what", "true"))[0] == 64
        assert ended(box.start(sys.executable, "container.py"))[2].startswith("usage: container.py")
        assert ended(box.wrapper("no-such-program"))[0] == 127
        assert ended(box.wrapper("--each", "no-such-program"))[0] == 127
        assert ended(box.wrapper("--receipt", "no-such-program"))[0] == 127
        assert ended(box.wrapper("/"))[0] == 126
        (box.path / "input.jsonl").write_text("{}\n{}\n")
        assert ended(box.wrapper("true"))[0] == 65
        (box.path / "input.jsonl").unlink()
        assert ended(box.wrapper("true"))[0] == 75

    def test_claims_before_it_begins(self, box: Container) -> None:
        box.env["DISPATCH_CLAIM_URI"] = (box.path / "claims" / "k1").as_uri()
        assert ended(box.wrapper("sh", "-c", "echo ${DISPATCH_CLAIM_URI-none}"))[1] == "none\n"
        box.env["CLOUD_RUN_EXECUTION"] = "job-double"
        code, out, err = ended(box.wrapper("echo", "begun"))
        assert (code, out) == (94, "")
        assert "belongs to execution job-abc" in err

    def test_runs_one_process_an_item_and_tells_of_each(self, box: Container) -> None:
        program = (
            'echo "$1 $ITEM $ITEM_INDEX"; [ "$ITEM" != c ] || exit 3; '
            '[ "$ITEM" != e ] || kill -9 $$'
        )
        code, out, _ = ended(box.wrapper("--each", "--", "sh", "-c", program, "sh", "<{item}>"))
        assert (code, out) == (1, "<c> c 0\n<d d> d d 1\n<e> e 2\n")
        found = box.receipt()
        assert found is not None
        assert found["complete"]
        assert found["items"] == [
            {"i": 0, "ok": False, "error": "exit code 3"},
            {"i": 1, "ok": True},
            {"i": 2, "ok": False, "error": "killed by SIGKILL"},
        ]

    def test_told_to_stop_between_items_it_keeps_the_finished_ones(self, box: Container) -> None:
        # A program that ends politely with 0 has not done its item for that.
        stops = "trap 'exit 0' TERM; echo there; while :; do sleep 0.01; done"
        process = box.wrapper("--each", "sh", "-c", f'[ "$ITEM" = c ] || {{ {stops}; }}')
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143
        assert box.kept() == [{"i": 0, "ok": True}]

    def test_can_tell_for_a_command_that_all_items_succeeded(self, box: Container) -> None:
        assert ended(box.wrapper("--receipt", "sh", "-c", "exit 7"))[0] == 7
        assert ended(box.wrapper("--receipt", "sh", "-c", "kill -9 $$"))[0] == 137
        assert box.files() == []
        assert ended(box.wrapper("--receipt", "sh", "-c", "echo $IDS"))[:2] == (0, "c,d d,e\n")
        found = box.receipt()
        assert found is not None
        assert [entry["ok"] for entry in found["items"]] == [True, True, True]

    def test_hands_a_signal_on_to_its_command(self, box: Container) -> None:
        program = 'trap "echo heard; exit 9" TERM; echo there; while :; do sleep 0.01; done'
        process = box.wrapper("--receipt", "sh", "-c", program)
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process)[:2] == (9, "heard\n")
        assert box.receipt() is None


@pytest.mark.skipif(
    not (INSTALLED / "installed.lock").exists(),
    reason="no emulator of Cloud Storage here: run scripts/google-emulators.sh",
)
def test_a_storage_that_others_wrote_takes_claim_progress_and_receipt_of_each_language(
    box: Container,
) -> None:
    with (
        run_emulators(box.path / "emulators", bigquery=False) as emulators,
        serve_front(emulators) as (front, url),
    ):
        box.env["STORAGE_EMULATOR_HOST"] = url
        box.env["DISPATCH_INPUT_URI"] = "gs://bucket/in/a b"
        emulators.upload("in/a b", DOCUMENT.encode())
        for language in ("node", "python") if shutil.which("node") else ("python",):
            box.env["DISPATCH_RESULT_URI"] = f"gs://bucket/results/é {language}/"
            box.env["DISPATCH_CLAIM_URI"] = f"gs://bucket/claims/{language}"
            box.env["CLOUD_RUN_EXECUTION"] = "job-abc"
            if language == "python":
                work = WORK.format("pass").replace("output=item", "output=item * 2000")
                process = box.python(work)
            else:
                process = box.node("(item) => item.repeat(2000)")
            assert ended(process) == (0, "", "")
            names = emulators.names(f"results/é {language}/")
            assert {"1.json", "1.output.1.json"} <= set(names)
            told = emulators.content(f"results/é {language}/1.json")
            items = read_receipt(told, Expected("k1", 1, 3, 3)).items
            assert items[1].output_uri == f"{box.env['DISPATCH_RESULT_URI']}1.output.1.json"
            stored_output = emulators.content(f"results/é {language}/1.output.1.json")
            assert json.loads(stored_output) == "d d" * 2000
            box.env["CLOUD_RUN_EXECUTION"] = "job-double"
            assert ended(box.speaking(language))[0] == 94
            assert emulators.content(f"claims/{language}") == b"job-abc"
        box.env["CLOUD_RUN_EXECUTION"] = "job-abc"
        assert "already; it stands" in ended(box.speaking("python"))[2]
        told = emulators.content("results/é python/1.progress.json")
        assert json.loads(told)["complete"] is False
        assert {status for status, _ in front.refused} == {412}


class TestTheOldestPython:
    """The helper in an image that is not renewed: of 3.8 and newer, the oldest that is here."""

    @pytest.fixture
    def old(self) -> str:
        found = oldest_python()
        if found is None:
            pytest.skip("there is no Python 3.8, 3.9 or 3.10 here, neither in PATH nor of pyenv")
        return found

    def test_a_program_claims_and_leaves_its_receipt(self, old: str, box: Container) -> None:
        with serve_gcs() as gcs:
            gcs.objects["in"] = DOCUMENT.encode()
            box.env["STORAGE_EMULATOR_HOST"] = gcs.url
            box.env["DISPATCH_INPUT_URI"] = "gs://bucket/in"
            box.env["DISPATCH_RESULT_URI"] = "gs://bucket/results/k1/"
            box.env["DISPATCH_CLAIM_URI"] = "gs://bucket/claims/k1"
            program = WORK.format("task.report_at(1, ok=True, output='x' * 5000)")
            assert ended(box.python(program, old)) == (0, "", "")
            found = read_receipt(gcs.objects["results/k1/1.json"], Expected("k1", 1, 3, 3))
            assert [item.error for item in found.items] == ["bad", None, None]
            assert found.items[1].output_uri == "gs://bucket/results/k1/1.output.1.json"
            box.env["CLOUD_RUN_EXECUTION"] = "job-double"
            assert ended(box.python(WORK.format("pass"), old))[0] == 94

    def test_a_program_that_fails_or_is_told_to_stop_leaves_what_it_did(
        self, old: str, box: Container
    ) -> None:
        assert ended(box.python(WORK.format("raise OSError('no')"), old))[0] == 1
        assert [entry["i"] for entry in box.kept() or []] == [0, 1]
        process = box.python(WORK.format("print('there', flush=True); time.sleep(600)"), old)
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (143, "", "")

    def test_the_wrapper_runs_one_process_an_item(self, old: str, box: Container) -> None:
        process = box.start(old, "container.py", "exec", "--each", "sh", "-c", '[ "$ITEM" != c ]')
        assert ended(process) == (1, "", "")
        found = box.receipt()
        assert found is not None
        assert [entry["ok"] for entry in found["items"]] == [False, True, True]
        (box.path / "input.jsonl").write_text("{}\n{}\n")
        assert ended(box.start(old, "container.py", "exec", "true"))[0] == 65


@cache
def oldest_python() -> str | None:
    """Find the oldest interpreter that the helper must do with and the other tests do not use."""
    for version in ("3.8", "3.9", "3.10"):
        of_pyenv = Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")
        for candidate in (*sorted(of_pyenv), shutil.which(f"python{version}")):
            # pyenv puts a program of that name into PATH also where it is switched off.
            code = "import sys; print(sys.executable)"
            command = [candidate or "false", "-I", "-c", code]
            told = subprocess.run(command, capture_output=True, text=True, check=False)
            if told.returncode == 0:
                return told.stdout.strip()
    return None


SHOW = 'sh -c \'printf "<%s>" "$ITEM"\''
JAVASCRIPT = "async (item) => { if (item === 'c') throw new Error('bad'); return item; }"


def without_jq(path: Path) -> str:
    """Make a PATH with what receipt.sh needs, and no more."""
    path.mkdir()
    names = "cat cp date dirname ln mkdir mktemp mv paste printf rm sed sh tr uname"
    for name in names.split():
        (path / name).symlink_to(str(shutil.which(name)))
    return str(path)


class TestOtherLanguages:
    @node
    def test_node_leaves_a_complete_receipt(self, box: Container) -> None:
        assert ended(box.node(JAVASCRIPT)) == (1, "", "")
        found = box.receipt()
        assert found is not None
        assert found.pop("written_at")
        assert found == {
            "version": 1,
            "key": "k1",
            "task": 1,
            "chunk": 40,
            "attempt": 3,
            "complete": True,
            "items": [
                {"i": 0, "ok": False, "error": "Error: bad"},
                {"i": 1, "ok": True, "output": "d d"},
                {"i": 2, "ok": True, "output": "e"},
            ],
        }
        assert "there is a receipt at" in ended(box.node(JAVASCRIPT))[2]

    @node
    def test_node_keeps_what_it_did_when_it_is_told_to_stop(self, box: Container) -> None:
        process = box.node(
            "async (item) => { if (item === 'd d') { console.log('there'); "
            "await new Promise((end) => setTimeout(end, 600000)); } }"
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143
        assert box.kept() == [{"i": 0, "ok": True}]

    @node
    @pytest.mark.parametrize(
        "text", ["e", "障", "😀", "\\u0001"], ids=["e", "cjk", "emoji", "control"]
    )
    @pytest.mark.parametrize("count", [1, 9, 100])
    def test_nodes_receipt_tells_of_every_item_in_the_bytes_that_it_may_have(
        self, count: int, text: str, box: Container
    ) -> None:
        box.bound_node(9000)
        box.env["DISPATCH_ITEMS"] = json.dumps(list(range(count)))
        work = f"""(item) => {{
            if (item % 3 === 1) throw '{text}'.repeat(5000);
            if (item % 3 === 2) return '{text}'.repeat(500);
        }}"""
        assert ended(box.node(work)) == (int(count > 1), "", "")
        data = (box.path / "results" / "k1" / "1.json").read_bytes()
        assert len(data) <= 9000
        read = read_receipt(data, Expected("k1", 1, 1, count))
        assert read.complete
        assert len(read.items) == count
        if count == 9:
            errors = [item.error or "" for item in read.failed]
            assert all(error.endswith("…") and len(error) > 100 for error in errors[:3])

    @node
    def test_node_puts_beside_the_receipt_what_the_dispatcher_would_spell_too_long(
        self, box: Container
    ) -> None:
        box.env["DISPATCH_ITEMS"] = '["a"]'
        assert ended(box.node("() => Array(700).fill(1e-7)")) == (0, "", "")
        data = (box.path / "results" / "k1" / "1.json").read_bytes()
        (item,) = read_receipt(data, Expected("k1", 1, 1, 1)).items
        assert item.output_uri == f"{box.env['DISPATCH_RESULT_URI']}1.output.0.json"
        assert json.loads((box.path / "results" / "k1" / "1.output.0.json").read_text())

    @node
    def test_node_refuses_more_items_than_a_receipt_can_tell_of(self, box: Container) -> None:
        box.bound_node(1000)
        box.env["DISPATCH_ITEMS"] = json.dumps(list(range(100)))
        code, out, err = ended(box.node("() => console.log('begun')"))
        assert (code, out) == (1, "")
        assert "no receipt can tell of 100 items: make the job's chunks smaller" in err

    @node
    def test_node_keeps_what_it_did_where_its_receipt_cannot_be_written(
        self, box: Container
    ) -> None:
        with serve_gcs() as gcs:
            gcs.refused = "results/k1/1.json"
            box.env["STORAGE_EMULATOR_HOST"] = gcs.url
            box.env["DISPATCH_RESULT_URI"] = "gs://bucket/results/k1/"
            code, _, err = ended(box.node(JAVASCRIPT))
            assert code == 1
            assert "cannot PUT gs://bucket/results/k1/1.json: 403" in err
            found = json.loads(gcs.objects["results/k1/1.progress.json"])
            assert (found["complete"], len(found["items"])) == (False, 3)

    @node
    def test_node_claims_and_writes_at_google(self, box: Container) -> None:
        with serve_gcs() as gcs:
            gcs.objects["in/k1"] = DOCUMENT.encode()
            box.env["STORAGE_EMULATOR_HOST"] = gcs.url
            box.env["DISPATCH_CLAIM_URI"] = "gs://bucket/claims/k1"
            box.env["DISPATCH_INPUT_URI"] = "gs://bucket/in/k1"
            box.env["DISPATCH_RESULT_URI"] = "gs://bucket/results/k1/"
            assert ended(box.node("() => 'x'.repeat(5000)")) == (0, "", "")
            found = json.loads(gcs.objects["results/k1/1.json"])
            uri = "gs://bucket/results/k1/1.output.0.json"
            assert found["items"][0] == {"i": 0, "ok": True, "output_uri": uri}
            assert gcs.objects["claims/k1"] == b"job-abc"
            box.env["CLOUD_RUN_EXECUTION"] = "job-double"
            assert ended(box.node(JAVASCRIPT))[0] == 94

    def test_a_shell_leaves_a_complete_receipt(self, box: Container) -> None:
        work = 'dispatch_each sh -c \'[ "$ITEM" != c ] || exit 3; echo "$ITEM"\''
        assert ended(box.shell(work)) == (1, "d d\ne\n", "")
        found = box.receipt()
        assert found is not None
        assert found.pop("written_at")
        assert found == {
            "version": 1,
            "key": "k1",
            "task": 1,
            "chunk": 40,
            "attempt": 3,
            "complete": True,
            "items": [
                {"i": 0, "ok": False, "error": "exit code 3"},
                {"i": 1, "ok": True},
                {"i": 2, "ok": True},
            ],
        }
        assert "there is a receipt already" in ended(box.shell(work))[2]
        assert box.files() == ["1.json"]

    def test_a_shell_needs_no_jq_for_plain_items(self, box: Container) -> None:
        box.env["PATH"] = without_jq(box.path / "programs")
        assert ended(box.shell(f"dispatch_each {SHOW}")) == (0, "<c><d d><e>", "")
        found = box.receipt()
        assert found is not None
        assert (found["chunk"], found["attempt"]) == (40, 3)
        box.env["DISPATCH_ITEMS"] = '[1,\n"b", "", " [c", -2.5e3]'
        assert ended(box.shell(f"dispatch_each {SHOW}"))[1] == "<1><b><>< [c><-2.5e3>"
        box.env["DISPATCH_ITEMS"] = " [ ] "
        assert ended(box.shell(f"dispatch_each {SHOW}"))[:2] == (0, "")

    @pytest.mark.parametrize(
        "items",
        [
            '[{"a":1,"b":2}]',
            "[1,[2,3]]",
            '["a,b"]',
            r'["a\"b"]',
            r'["a\nb"]',
            '["a]b"]',
            "[true]",
            '{"env":{"items":[1]}}',
            '{"items":[1],"result_uri":"https://h/x"}',
            "7",
        ],
    )
    def test_a_shell_without_jq_refuses_what_it_would_take_for_something_else(
        self, items: str, box: Container
    ) -> None:
        box.env["PATH"] = without_jq(box.path / "programs")
        box.env["DISPATCH_ITEMS"] = items
        code, out, err = ended(box.shell(f"dispatch_each {SHOW}"))
        assert (code, out) == (65, "")
        assert err == "receipt.sh: the items cannot be read, or not without jq\n"
        assert box.files() == []

    @jq
    def test_a_shell_with_jq_takes_any_items(self, box: Container) -> None:
        items = ["a\nb\n", "c", {"a": "\0", "b": [2]}, "\\u0000", "\0", 'é"\\', "", None, 2**53 - 1]
        document = json.dumps(items, indent=1)
        assert document.count("\n") > 9
        (box.path / "input.jsonl").write_text(document)
        code, out, _ = ended(box.shell(f"dispatch_each {SHOW}"))
        told = r'<{"a":"\u0000","b":[2]}>'
        assert (code, out) == (1, f'<a\nb\n><c>{told}<\\u0000><é"\\><><null><9007199254740991>')
        found = box.receipt()
        assert found is not None
        assert [entry["ok"] for entry in found["items"]] == [n != 4 for n in range(9)]
        assert found["items"][4]["error"] == "the item holds a NUL: no program can be given it"

    @jq
    @pytest.mark.parametrize(
        "items", ["7", '{"items":{"a":1}}', "[1", '[1,{"a":9007199254740993}]']
    )
    def test_a_shell_with_jq_refuses_what_are_no_items(self, items: str, box: Container) -> None:
        box.env["DISPATCH_ITEMS"] = items
        code, out, err = ended(box.shell(f"dispatch_each {SHOW}"))
        assert (code, out) == (65, "")
        assert "the items cannot be read" in err

    def test_a_shell_claims_before_it_begins(self, box: Container) -> None:
        box.env["DISPATCH_CLAIM_URI"] = (box.path / "claims" / "k1").as_uri()
        for _ in range(2):  # all tasks of one execution go on
            assert ended(box.shell(f"dispatch_each {SHOW}"))[:2] == (0, "<c><d d><e>")
        assert (box.path / "claims" / "k1").read_text() == "job-abc"
        box.env["CLOUD_RUN_EXECUTION"] = "job-double"
        code, out, err = ended(box.shell(f"dispatch_each {SHOW}"))
        assert (code, out) == (94, "")
        assert "belongs to execution job-abc, and this is job-double: nothing is done here" in err
        assert [path.name for path in (box.path / "claims").iterdir()] == ["k1"]

    @pytest.mark.parametrize("language", [pytest.param("node", marks=node), "shell", "python"])
    def test_every_language_takes_the_items_of_its_own_task_and_no_others(
        self, language: str, box: Container
    ) -> None:
        box.env["DISPATCH_TASK_INDEX"] = ""  # says nothing
        assert ended(box.speaking(language))[0] == 0
        found = box.receipt()
        assert found is not None
        assert (found["task"], found["chunk"]) == (1, 40)
        box.env["DISPATCH_TASK_INDEX"] = "-1"
        code, _, err = ended(box.speaking(language))
        assert code == (1 if language == "node" else 65)
        assert "-1" in err
        assert "must be a number" in err

    @pytest.mark.parametrize(
        ("given", "own"),
        [({"AWS_BATCH_JOB_ID": "12-34:7", "CLOUD_RUN_EXECUTION": ""}, "12-34"), ({}, None)],
    )
    @pytest.mark.parametrize("language", [pytest.param("node", marks=node), "shell", "python"])
    def test_every_language_claims_in_the_same_name(
        self, language: str, given: dict[str, str], own: str | None, box: Container
    ) -> None:
        del box.env["CLOUD_RUN_EXECUTION"]
        box.env.update(given, DISPATCH_CLAIM_URI=(box.path / "k1").as_uri())
        assert ended(box.speaking(language))[0] == 0
        assert (box.path / "k1").read_text() == (own or os.uname().nodename)

    @pytest.mark.parametrize("name", ["DISPATCH_CLAIM_URI", "DISPATCH_RESULT_URI"])
    @pytest.mark.parametrize("uri", ["gs://bucket/k1", "file:///a%20b", "file://host/a"])
    def test_a_shell_begins_nothing_that_it_could_not_claim_or_tell_of(
        self, name: str, uri: str, box: Container
    ) -> None:
        box.env[name] = uri
        code, out, err = ended(box.shell(f"dispatch_each {SHOW}"))
        assert (code, out) == (65, "")
        assert uri in err

    def test_a_shell_begins_nothing_where_the_claim_cannot_be_written(self, box: Container) -> None:
        (box.path / "claims").touch()
        box.env["DISPATCH_CLAIM_URI"] = (box.path / "claims" / "k1").as_uri()
        assert ended(box.shell(f"dispatch_each {SHOW}"))[:2] == (75, "")
        box.env["DISPATCH_CLAIM_URI"] = "https://h/k1?secret"
        code, out, err = ended(box.shell(f"dispatch_each {SHOW}"))
        assert (code, out) == (65, "")
        assert err == "receipt.sh: cannot claim https://h/k1: only files; use container.py\n"

    @pytest.mark.parametrize(
        "language", [pytest.param("node", marks=node), pytest.param("shell", marks=curl), "python"]
    )
    def test_every_language_writes_again_what_met_another_write(
        self, language: str, box: Container
    ) -> None:
        with serve_gcs() as gcs:
            gcs.conflicts = 1
            box.env["DISPATCH_RESULT_URI"] = f"{gcs.url}/bucket/out"
            assert ended(box.speaking(language)) == (0, "", "")
            assert json.loads(gcs.objects["out"])["complete"]
            assert [path for _, path, _ in gcs.seen] == ["/bucket/out"] * 2

    def test_a_shell_keeps_what_it_did_when_it_is_told_to_stop(self, box: Container) -> None:
        process = box.shell(
            "dispatch_each sh -c '[ \"$ITEM\" = c ] || { echo there; exec sleep 600; }'"
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 143
        assert box.kept() == [{"i": 0, "ok": True}]

    @pytest.mark.parametrize(
        "language", [pytest.param("node", marks=node), pytest.param("shell", marks=curl), "python"]
    )
    def test_every_language_reads_and_writes_signed_urls(
        self, language: str, box: Container
    ) -> None:
        with serve_s3() as (_, s3):
            s3.put_object(Bucket="bucket", Key="in", Body=DOCUMENT.encode())
            address = {"Bucket": "bucket", "Key": "in"}
            box.env["DISPATCH_INPUT_URI"] = s3.generate_presigned_url("get_object", address)
            address = {"Bucket": "bucket", "Key": "out"}
            box.env["DISPATCH_RESULT_URI"] = s3.generate_presigned_url("put_object", address)
            for _ in range(2):
                code, _, err = ended(box.speaking(language))
                assert code == 0
            assert "already; it stands" in err
            found = json.loads(s3.get_object(**address)["Body"].read())
            assert found["items"] == [{"i": number, "ok": True} for number in range(3)]

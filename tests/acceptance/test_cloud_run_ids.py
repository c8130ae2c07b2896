"""Story S1 as examples/cloud_run_ids tells it: ids to a Cloud Run job, sized to the work.

The images' own programs run as processes of the emulator, behind the entrypoints of their
Dockerfiles; Postgres, the broker and the worker are real.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from terraform import granted, resources
from typer.testing import CliRunner, Result
from waiting import until

from dispatcher import Batch, ChunkState, Dispatcher, load_config
from dispatcher.cli import app
from dispatcher.emulators.cloud_run import CloudRunEmulator
from dispatcher.emulators.cloud_run.processes import ProcessRunner
from examples.cloud_run_ids.emulated import emulated
from installation import ROOT, Site

HERE = ROOT / "examples" / "cloud_run_ids"
IDS = [str(number) for number in range(101, 113)]
BAD = "107"
IMAGES = {"reads-ids": "reads_ids", "wrapped": "wrapped", "by-index": "by_index"}
"""Each image, and where its Dockerfile lies."""

LIES_AT = {
    "/app/totals.py": HERE / "reads_ids" / "totals.py",
    "/app/totals.sh": HERE / "by_index" / "totals.sh",
    "/dispatcher/container.py": ROOT / "dispatcher" / "container.py",
}
"""Where the files of the images are here."""


def entrypoint(image: str) -> list[str]:
    """What an image runs, with its files where they are here."""
    text = (HERE / IMAGES[image] / "Dockerfile").read_text()
    found = re.search(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    assert found, f"{image} has no entrypoint"
    return [str(LIES_AT.get(word, word)) for word in json.loads(found[1])]


class Story:
    """An installation, and a cloud in which the images exist."""

    def __init__(self, site: Site, cloud: CloudRunEmulator) -> None:
        self.site = site
        self.cloud = cloud
        self.data = site.folder / "data"
        (self.data / "in").mkdir(parents=True)
        for name in IDS:
            self.write_numbers(name)
        (self.data / "in" / f"{BAD}.csv").unlink()
        jobs = emulated(cloud.grpc_address, self.data)
        del jobs["schedules"]  # it may be six in Tokyo while the test runs
        site.jobs.write_text(yaml.safe_dump(jobs))
        self.storage = site.folder / "storage"
        site.environment["DISPATCHER_STORAGE_URL"] = self.storage.as_uri()
        self.dispatcher: Dispatcher = site.dispatcher()

    def write_numbers(self, name: str) -> None:
        lines = [f"{number}\n" for number in range(int(name), int(name) + 3)]
        (self.data / "in" / f"{name}.csv").write_text("".join(lines))

    def totals(self) -> dict[str, int]:
        read = (json.loads(file.read_text()) for file in (self.data / "out").glob("*.json"))
        return {one["id"]: one["total"] for one in read}

    def command(self, *words: str) -> Result:
        return CliRunner().invoke(app, list(words), env=self.site.environment)

    def ended(self, batch: Batch) -> Batch:
        until(lambda: batch.refresh().finished, f"{batch.job} to end", 300)
        return batch.refresh()

    def executions(self, job: str) -> list[list[str]]:
        """The ids that each execution of a job was given, in the order of its tasks."""
        return [
            given(dict(execution.env))
            for execution in self.cloud.world.executed
            if execution.job.endswith(f"/{job}")
        ]


def given(env: dict[str, str]) -> list[str]:
    """The ids that an execution was given, however it was."""
    if "IDS" in env:
        return env["IDS"].split(",")
    lines = env["DISPATCH_INPUT"].splitlines()
    return [item for line in lines for item in json.loads(line)["items"]]


@pytest.fixture
def story(site: Site) -> Iterator[Story]:
    runner = ProcessRunner({image: entrypoint(image) for image in IMAGES}, limit=4)
    with CloudRunEmulator(runner=runner) as cloud:
        made = Story(site, cloud)
        yield made
        made.dispatcher.close()


# --- the story ------------------------------------------------------------------------------------


@pytest.mark.long
def test_ids_run_as_many_tasks_as_there_are_chunks_and_only_what_failed_runs_again(
    story: Story,
) -> None:
    story.site.worker()
    before = story.command("check")
    assert before.exit_code == 1
    assert "there is no Cloud Run job sample-job in my-project/asia-northeast1" in before.stdout
    assert "`dispatcher apply` makes it" in before.stdout
    assert story.command("apply", "--yes").exit_code == 0
    assert story.command("apply", "--check").exit_code == 0
    # From here on with the permissions that the Terraform gives the workers, and no more.
    story.cloud.world.permissions = granted(HERE)
    after = story.command("--json", "check")
    found = json.loads(after.stdout)
    assert after.exit_code == 0, after.stdout
    assert {one["level"] for one in found["checks"]} == {"ok"}, after.stdout
    for job in ("sample-job", "sample-job-packed", "sample-job-by-index"):
        assert f"{job} would take a launch" in after.stdout

    batches = {
        "sample-job": story.dispatcher.enqueue("sample-job", IDS, chunk_size=4),
        "sample-job-packed": story.dispatcher.enqueue("sample-job-packed", IDS),
        "sample-job-by-index": story.dispatcher.enqueue("sample-job-by-index", IDS),
    }
    of_bad = {
        "sample-job": ["105", "106", "107", "108"],  # its chunk, as one outcome is all there is
        "sample-job-packed": [BAD],
        "sample-job-by-index": [BAD],
    }
    first = {
        "sample-job": [IDS[0:4], IDS[4:8], IDS[8:12]],
        "sample-job-packed": [IDS],
        "sample-job-by-index": [IDS],
    }
    for name, batch in batches.items():
        ended = story.ended(batch)
        assert ended.state == "failed", story.site.logs()
        assert "failed with exit code 1; 2 of 2 attempts used" in str(ended.reason)
        # Seen and named: which chunk, which ids, why, and where to look.
        (bad,) = story.dispatcher.chunks(batch.id, states=[ChunkState.FAILED], items=True)
        assert json.loads(bad.items or "") == of_bad[name]
        assert [(one.outcome, one.exit_code) for one in bad.attempts] == [("failed", 1)] * 2
        assert "sample-job" in str(bad.attempts[-1].handle)
        shown = story.command("show", "--failed", batch.id)
        assert f"id {BAD}: " in shown.stdout
        # One retry, with nothing else in it.
        assert sorted(story.executions(name)) == sorted([*first[name], of_bad[name]])

    story.write_numbers(BAD)
    for batch in batches.values():
        again = story.command("retry", "--failed", batch.id)
        assert (again.exit_code, "1 chunk due again" in again.stdout) == (0, True), again.stdout
    for name, batch in batches.items():
        assert story.ended(batch).state == "succeeded"
        assert story.executions(name)[len(first[name]) + 1 :] == [of_bad[name]]
    tasks = [execution.task_count for execution in story.cloud.world.executed]
    assert sorted(tasks) == [1] * 9 + [len(IDS)] * 2
    # Only the wrapper knows of claims; the other two programs take no part.
    assert len(list((story.storage / "claims").rglob("d-*"))) == 3
    assert story.totals() == {name: 3 * int(name) + 3 for name in IDS}
    assert {code for _, code in story.cloud.refused} == {"NOT_FOUND"}  # by the first check


def test_two_at_a_time_in_one_execution_if_the_job_says_so(story: Story) -> None:
    jobs = yaml.safe_load(story.site.jobs.read_text())
    jobs["jobs"]["sample-job-packed"]["options"] |= {"mode": "strict", "parallelism": 2}
    story.site.jobs.write_text(yaml.safe_dump(jobs))
    story.dispatcher.close()
    story.dispatcher = story.site.dispatcher()
    assert story.command("apply", "--yes", "sample-job-packed").exit_code == 0
    story.site.worker()
    ended = story.ended(story.dispatcher.enqueue("sample-job-packed", IDS[3:8]))
    assert ended.counts == {"succeeded": 4, "failed": 1}, ended.reason
    executed = story.cloud.world.executed
    # The retry of one id is not held to a parallelism of two.
    assert [(one.task_count, one.parallelism) for one in executed] == [(5, 2), (1, 1)]
    assert story.cloud.world.most_busy == 2


# --- what it takes in the cloud -------------------------------------------------------------------


def test_the_laptops_jobs_are_the_clouds_but_for_the_place_and_the_waits() -> None:
    cloud = load_config(str(HERE / "jobs.yaml"))
    here = load_config("examples.cloud_run_ids.emulated:everything")
    other = {"env", "retry", "options"}
    for name, job in cloud.jobs.items():
        assert job.model_dump(exclude=other) == here.jobs[name].model_dump(exclude=other)
        assert job.env["IDS"] == here.jobs[name].env["IDS"]
        assert job.retry.attempts == here.jobs[name].retry.attempts
        assert (job.timeout, job.deadline) == (timedelta(minutes=30), timedelta(hours=3))
        assert here.jobs[name].options["definition"]["image"] in IMAGES
    assert cloud.jobs["sample-job"].limits.running == 2
    (schedule,) = cloud.schedules.values()
    assert (schedule.cron, schedule.timezone) == ("0 6 * * *", "Asia/Tokyo")


def test_the_cloud_has_the_jobs_of_the_jobs_file_with_their_images_and_no_retries() -> None:
    jobs = load_config(str(HERE / "jobs.yaml")).jobs
    made = resources(HERE)
    images = {
        job.options["job"]: job.options["definition"]["image"].rpartition("/")[2].partition(":")[0]
        for job in jobs.values()
    }
    assert made["locals"]["jobs"] == images
    (execution,) = made["google_cloud_run_v2_job.sample"]["template"]
    (task,) = execution["template"]
    assert (execution["parallelism"], task["max_retries"]) == (0, 0)


def test_only_the_workers_may_run_anything_and_only_these_jobs() -> None:
    grants = {
        (
            name.partition(".")[0],
            body["member"].removeprefix("${google_service_account.").partition(".")[0],
            body["role"],
        )
        for name, body in resources(HERE).items()
        if "_iam_member." in name
    }
    bucket = "google_storage_bucket_iam_member"
    assert grants == {
        (
            "google_cloud_run_v2_job_iam_member",
            "worker",
            "${google_project_iam_custom_role.launcher.id}",
        ),
        ("google_project_iam_member", "worker", "${google_project_iam_custom_role.follower.id}"),
        (bucket, "worker", "roles/storage.objectUser"),
        (bucket, "worker", "roles/storage.objectViewer"),
        (bucket, "task", "roles/storage.objectUser"),
        (bucket, "task", "roles/storage.objectViewer"),
    }
    follower = resources(HERE)["google_project_iam_custom_role.follower"]["permissions"]
    assert all(one.endswith((".get", ".list")) for one in follower)


def test_a_program_tells_wrong_usage_from_ids_that_failed(tmp_path: Path) -> None:
    def run(image: str, **env: str) -> int:
        done = subprocess.run(
            entrypoint(image),
            env={"PATH": "/usr/bin:/bin", "DATA": str(tmp_path), **env},
            capture_output=True,
            check=False,
        )
        return done.returncode

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.csv").write_text("20\n22\n")
    (tmp_path / "in" / "2.csv").write_text("many\n")
    assert run("reads-ids") == 64
    assert run("reads-ids", IDS="1") == 0
    assert run("reads-ids", IDS="2,1") == 1
    for index, code in enumerate((0, 1, 0)):  # 1 and 4, 3 (which is not there), and nothing
        place = {"CLOUD_RUN_TASK_INDEX": str(index), "CLOUD_RUN_TASK_COUNT": "3"}
        assert run("by-index", IDS="1,3", **place) == code
    assert json.loads((tmp_path / "out" / "1.json").read_text()) == {"id": "1", "total": 42}

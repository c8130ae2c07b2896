"""Story S3 as examples/compute_api tells it: a request to an API starts a long computation."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest
import schemathesis
import sqlalchemy as sa
import yaml
from anyio.from_thread import start_blocking_portal
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from terraform import resources
from waiting import until

from dispatcher import ConfigurationError, Dispatcher, load_config
from examples.compute_api.app import Order, Variables, create, create_app, read_tokens
from examples.compute_api.computations import tables
from examples.compute_api.image import count_primes
from installation import ROOT, Site

HERE = ROOT / "examples" / "compute_api"
TOKENS = {"ann-s-token": "ann", "bob-s-token": "bob"}
ANN = {"Authorization": "Bearer ann-s-token"}
BOB = {"Authorization": "Bearer bob-s-token"}


class Client:
    """Sends requests to an application in this process, over one event loop as a server has it."""

    def __init__(self, app: FastAPI) -> None:
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal())
        lifespan = app.router.lifespan_context(app)
        self._stack.enter_context(self._portal.wrap_async_context_manager(lifespan))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://api")

    def post(self, path: str, **request: Any) -> httpx.Response:
        return self._portal.call(lambda: self._client.post(path, **request))

    def get(self, path: str, headers: dict[str, str]) -> httpx.Response:
        return self._portal.call(lambda: self._client.get(path, headers=headers))

    def close(self) -> None:
        self._portal.call(self._client.aclose)
        self._stack.close()


class Api:
    """The application over a site's database, and a client of it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.dispatcher = site.dispatcher()
        self.engine = sa.create_engine(site.database_url)
        tables.create_all(self.engine)
        self.app = create_app(self.dispatcher, self.engine, TOKENS)
        self.client = Client(self.app)

    def close(self) -> None:
        self.client.close()

    def post(self, key: str, **order: Any) -> Any:
        headers = {**ANN, "Idempotency-Key": key}
        return self.client.post("/computations", json=order, headers=headers)

    def get(self, path: str) -> Any:
        return self.client.get(path, headers=ANN)

    def batches(self) -> int:
        ((count,),) = self.site.sql("SELECT count(*) FROM dispatcher.batch")
        return int(str(count))

    def ended(self, path: str) -> Any:
        def look() -> Any:
            found = self.get(path).json()
            return found if found["finished_at"] else None

        return until(look, f"{path} to end", 200)


@pytest.fixture
def api(site: Site) -> Iterator[Api]:
    shutil.copy(HERE / "jobs.yaml", site.jobs)
    made = Api(site)
    yield made
    made.close()


def pairs_below(end: int, gap: int) -> int:
    """Count the primes p < end for which p + gap is one too, in the plainest way."""
    marks = [False, False] + [True] * (end + gap)
    for number in range(2, int(len(marks) ** 0.5) + 1):
        if marks[number]:
            marks[number * number :: number] = [False] * len(
                range(number * number, len(marks), number)
            )
    return sum(1 for p in range(end) if marks[p] and marks[p + gap])


# --- the story ------------------------------------------------------------------------------------


def test_a_request_starts_a_computation_that_is_followed_to_its_output(api: Api) -> None:
    answer = api.post(
        "first",
        upto=2_500_000,
        args=["--gap=2"],
        env={"LOG_LEVEL": "debug"},
        tasks=2,
        timeout_seconds=300,
    )
    assert answer.status_code == 202, answer.text
    begun = answer.json()
    assert answer.headers["Location"] == f"/computations/{begun['id']}"
    assert (begun["state"], begun["progress"], begun["tasks"]) == ("planning", 0.0, {})
    early = api.get(f"{answer.headers['Location']}/output")
    assert early.status_code == 409
    assert early.json() == {"detail": "it is planning, and 0% of its tasks have ended"}

    api.site.worker()
    ended = api.ended(answer.headers["Location"])
    assert (ended["state"], ended["progress"]) == ("succeeded", 1.0), api.site.logs()
    assert ended["tasks"] == {"succeeded": 2}
    found = api.get(f"{answer.headers['Location']}/output").json()
    assert found["count"] == pairs_below(2_500_000, 2)
    assert [part["task"] for part in found["parts"]] == [0, 1]
    batch = api.dispatcher.get(begun["id"])
    assert (batch.params, batch.labels) == ({"upto": 2_500_000}, {"tenant": "ann"})
    ((kept,),) = api.site.sql("SELECT job FROM dispatcher.batch")
    assert isinstance(kept, dict)
    assert (kept["args"], kept["timeout"]) == (["--gap=2"], "5m")
    assert kept["env"] == {"LOG_LEVEL": "debug"}


def test_a_computation_that_runs_is_cancelled(api: Api) -> None:
    api.site.worker()
    path = api.post("long", upto=1_000_000_000, tasks=1).headers["Location"]
    until(lambda: api.get(path).json()["tasks"].get("running"), "it to run")
    answer = api.client.post(f"{path}/cancel", headers=ANN)
    told = answer.json()
    # It may have been stopped before the answer was written.
    assert (answer.status_code, told["cancelling"]) == (202, told["state"] != "cancelled")
    ended = api.ended(path)
    assert (ended["state"], ended["reason"]) == ("cancelled", "cancelled by ann")
    again = api.client.post(f"{path}/cancel", headers=ANN)
    assert (again.status_code, again.json()["state"]) == (202, "cancelled")


def test_a_computation_that_has_succeeded_is_not_cancelled(api: Api) -> None:
    api.site.worker()
    path = api.post("short", upto=10, tasks=1).headers["Location"]
    api.ended(path)
    answer = api.client.post(f"{path}/cancel", headers=ANN)
    assert answer.status_code == 409
    assert answer.json()["detail"] == "it had succeeded before it could be cancelled"
    assert api.get(path).json()["state"] == "succeeded"


# --- once, or not at all --------------------------------------------------------------------------


def test_a_double_click_starts_one_computation(api: Api) -> None:
    clicks = 8
    together = Barrier(clicks)

    def click(_: int) -> Any:
        together.wait(100)
        return api.post("click", upto=10_000)

    with ThreadPoolExecutor(clicks) as pool:
        answers = list(pool.map(click, range(clicks)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert api.batches() == 1
    assert api.site.sql("SELECT count(*) FROM computation") == [(1,)]


def test_the_same_key_with_another_body_is_a_conflict_that_names_the_difference(api: Api) -> None:
    first = api.post("key", upto=10_000, tasks=2).json()
    for order, difference in (
        ({"tasks": 3}, "overrides.tasks there is 2, here 3"),
        ({"tasks": 2, "upto": 20_000}, "params.upto there is 10000, here 20000"),
        ({"tasks": 2, "args": []}, "overrides.args there is not given, here []"),
        ({"tasks": 2, "timeout_seconds": 60}, "overrides.timeout there is not given, here 1m"),
    ):
        answer = api.post("key", **{"upto": 10_000, **order})
        assert answer.status_code == 409
        assert f"belongs to batch {first['id']}, a different request" in answer.json()["detail"]
        assert difference in answer.json()["detail"]
    assert api.post("key", upto=10_000, tasks=2, env={}).json()["id"] == first["id"]
    assert api.batches() == 1


def test_a_key_is_its_tenants_own(api: Api) -> None:
    mine = api.post("key", upto=10_000).json()["id"]
    theirs = api.client.post(
        "/computations", json={"upto": 99}, headers={**BOB, "Idempotency-Key": "key"}
    )
    assert theirs.status_code == 202
    assert theirs.json()["id"] != mine
    assert api.get(f"/computations/{theirs.json()['id']}").status_code == 404
    assert api.get(f"/computations/{mine}").status_code == 200


def test_when_the_application_rolls_back_there_is_no_batch(api: Api) -> None:
    with api.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the application fails'; END $$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER fail BEFORE INSERT ON computation EXECUTE FUNCTION fail()"
        )
    assert api.post("key", upto=10_000).status_code == 500
    assert api.batches() == 0
    with api.engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER fail ON computation")
    assert api.post("key", upto=10_000).status_code == 202, "the key was not used up"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["aaaaaaaaaaaa", "A", "%00", "%ed%a0%80", "a" * 4000, "..%2f..%2fetc", "' OR 1=1 --", "%F0%9F"],
)
def test_an_unknown_computation_is_not_found(api: Api, path: str) -> None:
    for answer in (
        api.get(f"/computations/{path}"),
        api.get(f"/computations/{path}/output"),
        api.client.post(f"/computations/{path}/cancel", headers=ANN),
    ):
        assert answer.status_code == 404
        assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer nobody-s"}, {"Authorization": "Basic x"}]
)
def test_nothing_is_done_without_a_token(api: Api, headers: dict[str, str]) -> None:
    headers = {**headers, "Idempotency-Key": "k"}
    answer = api.client.post("/computations", json={"upto": 1}, headers=headers)
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert api.client.get("/computations/x", headers=headers).status_code == 401
    assert api.batches() == 0


@pytest.mark.parametrize(
    ("order", "where"),
    [
        ({"args": ["--gap=3"]}, ["body", "args", 0]),
        ({"args": ["{items:csv}"]}, ["body", "args", 0]),
        ({"args": ["--gap=2", "--gap=4"]}, ["body", "args"]),
        ({"env": {"LOG_LEVEL": "trace"}}, ["body", "env", "LOG_LEVEL"]),
        ({"env": {"PATH": "/bin"}}, ["body", "env", "PATH"]),
        ({"env": {"DISPATCH_KEY": "x"}}, ["body", "env", "DISPATCH_KEY"]),
        ({"tasks": 21}, ["body", "tasks"]),
        ({"tasks": "4"}, ["body", "tasks"]),
        ({"timeout_seconds": 7201}, ["body", "timeout_seconds"]),
        ({"command": ["sh"]}, ["body", "command"]),
        ({"upto": 0}, ["body", "upto"]),
    ],
)
def test_what_may_not_be_set_is_refused_by_its_name(
    api: Api, order: dict[str, Any], where: list[Any]
) -> None:
    answer = api.post("key", **{"upto": 100, **order})
    assert answer.status_code == 422
    assert where in [one["loc"] for one in answer.json()["detail"]]
    assert api.batches() == 0


def test_the_jobs_own_fence_holds_where_the_api_lets_something_through(site: Site) -> None:
    jobs = yaml.safe_load((HERE / "jobs.yaml").read_text())
    jobs["jobs"]["count-primes"]["overrides"] = {"tasks": 2}
    site.write_jobs(yaml.safe_dump(jobs))
    api = Api(site)
    try:
        answer = api.post("key", upto=100, tasks=3, args=["--gap=2"])
        assert answer.status_code == 422
        (wrong,) = answer.json()["detail"]
        assert 'overrides.args is ["--gap=2"]' in wrong["msg"]
        assert "overrides.tasks is 3; it must be at most 2" in wrong["msg"]
        assert "`overrides` of the job 'count-primes' in the jobs file" in wrong["msg"]
        assert api.batches() == 0
    finally:
        api.close()


@pytest.mark.parametrize("key", [None, "", "a" * 101, "a b", "ä"])
def test_a_request_needs_a_key_of_plain_letters(api: Api, key: str | None) -> None:
    headers: dict[str, Any] = {**ANN}
    if key is not None:
        headers["Idempotency-Key"] = key.encode()
    answer = api.client.post("/computations", json={"upto": 1}, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["header", "Idempotency-Key"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"upto": NaN}',
        b'{"upto": 1e400}',
        b'{"upto": 5, "\\ud800": 1}',
        b'{"upto": 5, "args": ["\\ud800"]}',
        b'{"upto": 5, "env": {"LOG_LEVEL": "\\u0000"}}',
        b'{"upto": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_none_is_refused_and_does_no_harm(api: Api, body: bytes) -> None:
    headers = {**ANN, "Idempotency-Key": "k", "Content-Type": "application/json"}
    answer = api.client.post("/computations", content=body, headers=headers)
    assert answer.status_code in {400, 422}
    assert "detail" in answer.json()
    assert api.batches() == 0


def test_a_database_that_does_not_answer_is_told_as_try_again(site: Site) -> None:
    shutil.copy(HERE / "jobs.yaml", site.jobs)
    away = "postgresql+psycopg://nobody@127.0.0.1:1/nothing"
    engine = sa.create_engine(away)
    with Dispatcher(database_url=away, jobs=str(site.jobs)) as dispatcher:
        client = Client(create_app(dispatcher, engine, TOKENS))
        headers = {**ANN, "Idempotency-Key": "k"}
        answers = [
            client.post("/computations", json={"upto": 1}, headers=headers),
            client.get("/computations/aaaaaaaaaaaa", headers=headers),
        ]
        client.close()
    for answer in answers:
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.json() == {"detail": "try again: the database does not answer"}


def test_a_database_whose_connections_are_all_in_use_is_told_as_try_again(site: Site) -> None:
    shutil.copy(HERE / "jobs.yaml", site.jobs)
    engine = sa.create_engine(site.database_url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    tables.create_all(engine)
    client = Client(create_app(site.dispatcher(), engine, TOKENS))
    headers = {**ANN, "Idempotency-Key": "k"}
    begun = client.post("/computations", json={"upto": 1}, headers=headers).json()

    def ask() -> list[httpx.Response]:
        return [
            client.post("/computations", json={"upto": 1}, headers=headers),
            client.get(f"/computations/{begun['id']}", headers=headers),
        ]

    with engine.connect():
        refused = ask()
    served = ask()
    client.close()
    for answer in refused:
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.json() == {"detail": "try again: all connections to the database are in use"}
    assert [answer.status_code for answer in served] == [202, 200]


def test_the_application_is_made_from_its_settings(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(HERE / "jobs.yaml", site.jobs)
    for name in ("DISPATCHER_DATABASE_URL", "DISPATCHER_BROKER_URL", "DISPATCHER_JOBS"):
        monkeypatch.setenv(name, site.environment[name])
    subprocess.run(
        [sys.executable, "-m", "examples.compute_api.app"],
        env=site.environment,
        check=True,
        cwd=site.folder,
    )
    monkeypatch.setenv("COMPUTE_TOKENS", json.dumps(TOKENS))
    client = Client(create())
    headers = {**BOB, "Idempotency-Key": "k"}
    answer = client.post("/computations", json={"upto": 1}, headers=headers)
    client.close()
    assert answer.status_code == 202


@pytest.mark.parametrize("text", ["", "{", "[]", '{"secret": 5}'])
def test_tokens_that_cannot_be_read_are_not_repeated(text: str) -> None:
    with pytest.raises(ConfigurationError, match="must be a JSON object") as told:
        read_tokens(text)
    assert "5" not in str(told.value)


# --- fuzzed from its own description --------------------------------------------------------------

EXAMPLES = 30
STEPS = 6
FUZZING = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def described(api: Api) -> Any:
    load_all_checks()
    schema = schemathesis.openapi.from_asgi("/openapi.json", api.app)
    schema.config.update(headers=ANN)
    return schema


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_an_order_is_taken_exactly_if_its_description_allows_it(
    described: Any, api: Api, mode: GenerationMode
) -> None:
    codes = Counter[int]()

    @FUZZING
    @given(case=described["/computations"]["POST"].as_strategy(generation_mode=mode))
    def order(case: Any) -> None:
        codes[case.call_and_validate(headers=ANN).status_code] += 1

    order()
    if mode is GenerationMode.POSITIVE:
        assert codes[202]
        assert set(codes) <= {202, 409}
    else:
        assert codes[202] == api.batches() == 0, "every check of it is its own"


def test_no_sequence_of_requests_gets_an_answer_that_the_description_does_not_know(
    described: Any,
) -> None:
    seen = set[tuple[str, int]]()

    class Walk(described.as_state_machine()):  # type: ignore[misc]  # made at run time
        def get_call_kwargs(self, case: Any) -> dict[str, Any]:  # noqa: ARG002 - its signature
            return {"headers": ANN}

        def after_call(self, response: Any, case: Any) -> None:
            seen.add((case.operation.label, response.status_code))

    Walk.run(settings=FUZZING)
    one = "/computations/{computation_id}"
    assert {(f"GET {one}", 200), (f"GET {one}/output", 409), (f"POST {one}/cancel", 202)} <= seen
    assert max(code for _, code in seen) < 500


# --- its parts ------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The files of the image, as its Dockerfile copies them."""
    lines = (HERE / "image" / "Dockerfile").read_text().splitlines()
    (copied,) = [line.split()[1:] for line in lines if line.startswith("COPY")]
    folder = tmp_path / "app"
    folder.mkdir()
    for name in copied[:-1]:
        shutil.copy(ROOT / name, folder)
    return folder


def counted(image: Path, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Run the image's program as the image does: nothing of the project is near."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(image / "count_primes.py"), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=image,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("gap", [0, 2, 4, 6])
def test_primes_are_counted_whatever_the_blocks(gap: int) -> None:
    for edges in ([0, 1], [0, 2, 3, 4], [0, 7, 8, 9, 10, 100, 5000], [0, 30_000]):
        found = sum(count_primes.count(low, high, gap) for low, high in itertools.pairwise(edges))
        assert found == pairs_below(edges[-1], gap)


def test_primes_far_out_are_counted_too() -> None:
    assert count_primes.count(0, 1_000_000, 0) == 78_498
    assert count_primes.count(0, 1_000_000, 2) == 8_169
    start, end = 1_000_000_000 - 300, 1_000_000_000
    plainly = sum(all(n % d for d in range(2, 31_623)) for n in range(start, end))
    assert count_primes.count(start, end, 0) == plainly


def test_the_image_finds_its_items_wherever_they_are_and_leaves_its_result(
    tmp_path: Path, image: Path
) -> None:
    items = [[{"from": 0, "to": 100}], [{"from": 100, "to": 200}]]
    document = "".join(
        json.dumps({"chunk": n, "attempt": 1, "items": own}) + "\n" for n, own in enumerate(items)
    )
    (tmp_path / "input.jsonl").write_text(document)
    (tmp_path / "items.json").write_text(json.dumps(items[1]))
    for name, told in {
        "inline": {"DISPATCH_ITEMS": json.dumps(items[1])},
        "document": {"DISPATCH_INPUT": document, "CLOUD_RUN_TASK_INDEX": "1"},
        "referred": {
            "DISPATCH_INPUT_URI": (tmp_path / "input.jsonl").as_uri(),
            "CLOUD_RUN_TASK_INDEX": "1",
        },
        "array": {"DISPATCH_INPUT_URI": (tmp_path / "items.json").as_uri()},
    }.items():
        place = tmp_path / name
        code, said = counted(image, {**told, "DISPATCH_RESULT_URI": f"{place.as_uri()}/"})
        assert code == 0, said
        result = place / f"{told.get('CLOUD_RUN_TASK_INDEX', '0')}.json"
        (found,) = json.loads(result.read_text())["items"]
        assert found["output"]["count"] == 21


@pytest.mark.parametrize(
    ("told", "arguments", "code"),
    [
        ({}, [], 65),
        ({"DISPATCH_ITEMS": "{"}, [], 65),
        ({"DISPATCH_ITEMS": '[{"from": "a", "to": 1}]'}, [], 65),
        ({"DISPATCH_ITEMS": "[7]"}, [], 65),
        ({"DISPATCH_INPUT": '{"items": []}\n', "CLOUD_RUN_TASK_INDEX": "1"}, [], 65),
        ({"DISPATCH_ITEMS": "[]"}, ["--gap=3"], 64),
        ({"DISPATCH_ITEMS": "[]"}, ["--what"], 64),
        ({"DISPATCH_ITEMS": "[]"}, [], 0),
    ],
)
def test_the_image_tells_bad_input_by_its_exit_code(
    image: Path, told: dict[str, str], arguments: list[str], code: int
) -> None:
    assert counted(image, told, *arguments)[0] == code


# --- what it takes in the cloud -------------------------------------------------------------------


def test_both_jobs_files_raise_the_same_fence_which_is_the_apis_own() -> None:
    here, cloud = (
        load_config(str(HERE / name)).jobs["count-primes"] for name in ("jobs.yaml", "cloud.yaml")
    )
    other = {"target", "command", "retry", "options"}
    assert here.model_dump(exclude=other) == cloud.model_dump(exclude=other)
    fence = here.overrides
    order = Order.model_json_schema()["properties"]

    def most(name: str) -> int:
        return max(one.get("maximum", 0) for one in order[name]["anyOf"])

    assert fence.args
    assert set(fence.env) == set(Variables.model_fields)
    assert fence.tasks == most("tasks")
    assert fence.timeout == timedelta(seconds=most("timeout_seconds"))


def test_in_the_cloud_only_the_workers_may_run_anything() -> None:
    grants = {
        (body["member"].removeprefix("${google_service_account.").partition(".")[0], body["role"])
        for name, body in resources(HERE).items()
        if "_iam_member." in name
    }
    assert grants == {
        ("worker", "${google_project_iam_custom_role.launcher.id}"),
        ("worker", "${google_project_iam_custom_role.follower.id}"),
        ("worker", "roles/storage.objectUser"),
        ("task", "roles/storage.objectViewer"),
        ("task", "roles/storage.objectUser"),
        ("api", "roles/storage.objectViewer"),
    }


def test_the_cloud_run_job_leaves_retries_to_the_dispatcher_and_has_room_for_the_fence() -> None:
    fence = load_config(str(HERE / "jobs.yaml")).jobs["count-primes"].overrides
    (execution,) = resources(HERE)["google_cloud_run_v2_job.count_primes"]["template"]
    (task,) = execution["template"]
    assert task["max_retries"] == 0
    assert fence.timeout == timedelta(seconds=int(task["timeout"].removesuffix("s")))
    assert execution["parallelism"] == 0, "Cloud Run refuses fewer tasks than that"

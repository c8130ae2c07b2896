from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from dispatcher.backends import registry
from dispatcher.backends.base import Meter
from dispatcher.config import Target, load_config, load_settings, standalone_file
from dispatcher.errors import ConfigurationError, UnknownJob
from dispatcher.job import Job
from dispatcher.problems import problems_of
from dispatcher.settings import misspelt_variables

DATABASE = "postgresql://me:pw@host:5432/db"


class Mount(BaseModel):
    model_config = ConfigDict(extra="forbid")
    path: str = "/"


class FakeBackend:
    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        cpu: int | None = None
        mounts: tuple[Mount, ...] = ()

    class Settings(BaseModel):
        model_config = ConfigDict(extra="forbid")
        region: str = "eu"

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    COMMAND: ClassVar[str] = "required"

    def __init__(self, name: str, settings: BaseModel, _meter: Meter) -> None:
        self.name = name
        self.settings = settings


@pytest.fixture(autouse=True)
def _clean_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty current directory, no DISPATCHER_* variable, and one backend, "fake"."""
    for name in tuple(os.environ):
        if name.upper().startswith("DISPATCHER_"):
            monkeypatch.delenv(name)
    module = ModuleType("fake_backend")
    module.__dict__["FakeBackend"] = FakeBackend
    monkeypatch.setitem(sys.modules, "fake_backend", module)
    for name in tuple(registry.BACKENDS):
        monkeypatch.delitem(registry.BACKENDS, name)
    monkeypatch.setitem(registry.BACKENDS, "fake", "fake_backend:FakeBackend")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def written(text: str, name: str = "jobs.yaml") -> str:
    Path(name).write_text(text)
    return name


def problems(source: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load_config(source)
    return str(caught.value).splitlines()


def problems_of_yaml(text: str) -> list[str]:
    return problems(written(text))


def job_problems(job: str) -> list[str]:
    return problems_of_yaml(f"targets: {{here: {{backend: fake}}}}\njobs: {{j: {job}}}")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (DATABASE, "postgresql+psycopg://me:pw@host:5432/db"),
        ("postgres://host/db", "postgresql+psycopg://host/db"),
        ("postgresql+psycopg://host/db", "postgresql+psycopg://host/db"),
        ("postgresql:///db?host=/run/pg", "postgresql+psycopg:///db?host=/run/pg"),
    ],
)
def test_the_database_url_is_always_for_psycopg(
    monkeypatch: pytest.MonkeyPatch, given: str, used: str
) -> None:
    monkeypatch.setenv("DISPATCHER_DATABASE_URL", given)
    assert load_settings().database_url == used


def test_settings_have_defaults() -> None:
    settings = load_settings(database_url=DATABASE, broker_url=None)
    assert settings.broker_url is None
    assert settings.storage_url is None
    assert settings.jobs is None
    assert settings.actor.startswith(f"{getpass.getuser()}@")
    assert (settings.log_level, settings.level) == ("INFO", logging.INFO)
    assert settings.log_format == "console"
    assert settings.launch_concurrency == 16
    assert settings.sweep_interval == timedelta(seconds=2)
    assert settings.heartbeat == timedelta(seconds=5)
    assert settings.lease == timedelta(seconds=15)
    assert settings.call_window == timedelta(seconds=15)
    assert settings.pool_size == 8


def test_the_environment_sets_them_and_arguments_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DISPATCHER_DATABASE_URL", DATABASE)
    monkeypatch.setenv("DISPATCHER_BROKER_URL", "redis+socket:///run/redis.sock")
    monkeypatch.setenv("DISPATCHER_STORAGE_URL", "file:///data")
    monkeypatch.setenv("DISPATCHER_LEASE", "1m")
    monkeypatch.setenv("DISPATCHER_LOG_LEVEL", "debug")
    monkeypatch.setenv("DISPATCHER_ACTOR", "")
    settings = load_settings(broker_url="memory://", lease=45)
    assert settings.broker_url == "memory://"
    assert settings.storage_url == "file:///data"
    assert settings.lease == timedelta(seconds=45)
    assert settings.level == logging.DEBUG
    assert "@" in settings.actor


def test_everything_wrong_is_told_at_once_by_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "DATABASE_URL": "mysql://root:s3cret@h/db",
        "BROKER_URL": "amqp://u:s3cret@h",
        "STORAGE_URL": "s3:///x",
        "LOG_LEVEL": "loud",
        "LOG_FORMAT": "xml",
        "LAUNCH_CONCURRENCY": "500",
        "LEASE": "5x",
        "POOL_SIZE": "many",
    }.items():
        monkeypatch.setenv(f"DISPATCHER_{name}", value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings(colour="red")
    assert str(caught.value).splitlines() == [
        (
            'DISPATCHER_DATABASE_URL is "mysql://root:***@h/db"; it must be a URL such as '
            "postgresql://user:password@host:5432/database"
        ),
        (
            'DISPATCHER_BROKER_URL is "amqp://u:***@h"; it must be a URL such as '
            "redis://host:6379/0, rediss://… or redis+socket:///path"
        ),
        (
            'DISPATCHER_STORAGE_URL is "s3:///x"; it must be a URL such as '
            "file:///absolute/path, s3://bucket/path or gs://bucket"
        ),
        (
            "DISPATCHER_LOG_LEVEL is \"LOUD\"; it must be 'DEBUG', 'INFO', 'WARNING', 'ERROR' "
            "or 'CRITICAL'"
        ),
        "DISPATCHER_LOG_FORMAT is \"xml\"; it must be 'console' or 'json'",
        'DISPATCHER_LAUNCH_CONCURRENCY is "500"; it must be at most 256',
        (
            'DISPATCHER_LEASE is "5x"; it must be a duration such as 90s, 10m, 1h30m or 2d, '
            "or a number of seconds"
        ),
        'DISPATCHER_POOL_SIZE is "many"; it must be an integer',
        (
            "the argument colour is not a known key; allowed: actor, broker_url, call_window, "
            "database_url, heartbeat, jobs, launch_concurrency, lease, log_format, log_level, "
            "pool_size, storage_keep, storage_url, sweep_interval"
        ),
    ]
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("database_url", "postgresql://host:many/db"),
        ("database_url", "postgresql+psycopg2://host/db"),
        ("database_url", "host/db"),
        ("database_url", "postgresql://"),
        ("broker_url", "redis"),
        ("broker_url", "redis://host:port"),
        ("storage_url", "file://relative"),
        ("storage_url", "/data"),
        ("storage_url", "gs://"),
        ("storage_url", "s3://[bucket"),
        ("lease", 5),
        ("log_level", 10),
    ],
)
def test_other_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"^the argument {name} is .*; it must be "):
        load_settings(**{"database_url": DATABASE, name: value})


def test_a_lease_outlives_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPATCHER_LEASE", "5s")
    with pytest.raises(ConfigurationError) as caught:
        load_settings(database_url=DATABASE)
    assert str(caught.value) == (
        'DISPATCHER_LEASE is "5s"; it must be longer than the heartbeat, 5s'
    )


def test_settings_do_not_show_their_passwords() -> None:
    settings = load_settings(database_url=DATABASE, broker_url="redis://:pw@h")
    assert "pw" not in repr(settings)


def test_a_user_without_a_name_is_named_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert load_settings(database_url=DATABASE).actor.startswith("uid")


def test_without_a_database_the_reader_is_told_what_to_do() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert str(caught.value) == (
        "DISPATCHER_DATABASE_URL is not set, and no standalone is running here "
        "(no .dispatcher/standalone.json); set it, e.g. to "
        "postgresql://user:password@host:5432/database, or run `dispatcher standalone`"
    )


def standalone(told: object) -> Path:
    path = standalone_file()
    path.parent.mkdir(parents=True)
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return path


def test_a_running_standalone_gives_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DISPATCHER_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DISPATCHER_BROKER_URL", "memory://")
    path = standalone(
        {
            "database_url": DATABASE,
            "broker_url": "redis://h",
            "storage_url": "file:///there",
            "jobs": "a.yaml",
            "pid": os.getpid(),
            "x": 1,
        }
    )
    assert path == tmp_path / "elsewhere" / ".dispatcher" / "standalone.json"
    settings = load_settings(jobs="mine.yaml")
    assert settings.database_url == "postgresql+psycopg://me:pw@host:5432/db"
    assert settings.broker_url == "memory://"
    assert settings.jobs == "mine.yaml"
    assert settings.storage_url == "file:///there"
    assert load_settings().jobs == "a.yaml"


def test_a_standalone_that_was_killed_is_said_to_be_gone() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = standalone({"database_url": DATABASE, "pid": dead.pid})
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert str(caught.value) == (
        f"the standalone that wrote {path} is gone (process {dead.pid}); start `dispatcher "
        "standalone` there again, or set DISPATCHER_DATABASE_URL"
    )
    # In a container it has another number there than here; its lock is the same.
    with path.with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert load_settings().database_url.endswith("//me:pw@host:5432/db")


def test_a_setting_that_is_misspelt_is_told_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HOME", "LEASE", "SERVICE_HOST", "PORT", "PORT_8080_TCP", "LAESE", "STORGE_URL"):
        monkeypatch.setenv(f"DISPATCHER_{name}", "x")
    assert misspelt_variables() == [
        "DISPATCHER_LAESE is no setting and is ignored: did you mean DISPATCHER_LEASE?",
        "DISPATCHER_STORGE_URL is no setting and is ignored: did you mean DISPATCHER_STORAGE_URL?",
    ]


def test_a_named_database_leaves_the_standalone_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    standalone({"database_url": "postgresql://other/db", "jobs": "a.yaml"})
    monkeypatch.setenv("DISPATCHER_DATABASE_URL", DATABASE)
    assert load_settings().jobs is None


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{", "cannot be read (Expecting property name"),
        ([], "names no database_url; start `dispatcher standalone` again"),
        ({"jobs": "a"}, "names no database_url; start `dispatcher standalone` again"),
        ({"database_url": "mysql://h"}, ': database_url is "mysql://h"; it must be a URL'),
    ],
)
def test_a_standalone_file_that_is_wrong_is_named(told: object, said: str) -> None:
    standalone(told)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert str(caught.value).startswith(".dispatcher/standalone.json")
    assert said in str(caught.value)


# --- the jobs file --------------------------------------------------------------------------------

GOOD = """
targets:
  here: {backend: fake, max_running: 4, launches_per_minute: 30, region: us}
jobs:
  nightly-export:
    target: here
    items: {source: "examples.export.tables:list_tables"}
    command: ["python3", "-m", "examples.export.export_table"]
    env: {OUT: demo-out}
    chunk: {max_items: 4, balance_by: bytes}
    timeout: 10m
    start_timeout: 2m
    retry: {attempts: 3, initial: 5s, factor: 2, max: 5m, exit_codes: {65: fail, 75: retry}}
    limits: {running: 4}
    deadline: 3h
    success: {max_failed_chunks: 0}
    options: {cpu: 2}
"""


def test_a_yaml_file_gives_targets_and_jobs() -> None:
    config = load_config(written(GOOD))
    assert config.source == "jobs.yaml"
    target = config.targets["here"]
    assert (target.name, target.backend, target.max_running) == ("here", "fake", 4)
    assert target.launches_per_minute == 30.0
    assert target.reads_per_minute is None
    assert target.settings == FakeBackend.Settings(region="us")
    job = config.job("nightly-export")
    assert job.name == "nightly-export"
    assert job.chunk.max_items == 4
    assert job.retry.exit_codes == {65: "fail", 75: "retry"}
    assert job.options == {"cpu": 2}
    with pytest.raises(TypeError):
        config.jobs["other"] = job  # type: ignore[index]  # a Mapping that cannot be written


def test_an_unknown_job_is_told_with_the_known_ones() -> None:
    with pytest.raises(UnknownJob) as caught:
        load_config(written(GOOD)).job("nightly-exprot")
    assert str(caught.value) == (
        'no job "nightly-exprot" is configured in jobs.yaml; '
        'configured: nightly-export (did you mean "nightly-export"?)'
    )


BAD = """
targets:
  here: {backend: fake, max_running: 0, regoin: us}
  There: {backend: fake}
  gone: {backend: fkae}
  5: {backend: fake}
  lone: {}
jobs:
  nightly-export:
    target: hre
    command: ["python3"]
    args: ['{"a": 1}']
    env: {PORT: 8080, DISPATCH_KEY: k}
    retry: {attemps: 3, attempts: 0, exit_codes: {65: fial, 256: retry}}
    colour: blue
  b: {target: here, command: [x], options: {cpu: lots}}
  c: {target: gone, command: [x], chunk: {}, chunk: {size: 1}, options: {unread: 1}}
  d:
  e: {command: [x], name: f}
tagets: {}
"""


def test_everything_wrong_in_a_file_is_told_at_once_with_its_path() -> None:
    target_keys = (
        "backend, launches_per_minute, logs_per_minute, max_executions, max_running, "
        "reads_per_minute, region, writes_per_minute"
    )
    assert problems_of_yaml(BAD) == [
        'jobs.yaml:17:46: the key "chunk" is given twice in one mapping; leave one out',
        (
            "jobs.yaml: tagets is not a known key; allowed: jobs, schedules, targets "
            '(did you mean "targets"?)'
        ),
        "jobs.yaml: targets.5 is no name, which must be text: put it in quotes",
        (
            f"jobs.yaml: targets.here.regoin is not a known key; allowed: {target_keys} "
            '(did you mean "region"?)'
        ),
        "jobs.yaml: targets.here.max_running is 0; it must be at least 1",
        (
            'jobs.yaml: targets.There is "There"; it must begin with a lower-case letter and go on '
            "with lower-case letters, digits and '-', at most 40 in all"
        ),
        (
            'jobs.yaml: targets.gone.backend cannot be used: "fkae" is no known backend; '
            'known: fake (did you mean "fake"?)'
        ),
        "jobs.yaml: targets.lone.backend is missing; it is required",
        (
            'jobs.yaml: jobs.nightly-export.args.0 is "{\\"a\\": 1}"; {"a": 1} is no template; '
            "allowed: {items:csv}, {items:json}, {items:lines}, {pack:csv}, {pack:json}, "
            "{pack:lines}, {chunk.index}, {attempt}, "
            '{batch.id}, {param:NAME}; write a literal brace twice, as in {{"a": 1}}'
        ),
        "jobs.yaml: jobs.nightly-export.env.PORT is 8080; it must be text: put it in quotes",
        (
            'jobs.yaml: jobs.nightly-export.env.DISPATCH_KEY is "DISPATCH_KEY"; it must not begin '
            "with DISPATCH_: the dispatcher sets those itself"
        ),
        "jobs.yaml: jobs.nightly-export.retry.attempts is 0; it must be at least 1",
        (
            'jobs.yaml: jobs.nightly-export.retry.exit_codes.65 is "fial"; '
            "it must be 'retry' or 'fail'"
        ),
        (
            "jobs.yaml: jobs.nightly-export.retry.exit_codes.256 is 256; "
            "it must be an exit code from 1 to 255"
        ),
        (
            "jobs.yaml: jobs.nightly-export.retry.attemps is not a known key; allowed: attempts, "
            "exit_codes, factor, infrastructure_attempts, initial, jitter, max, on_failure, "
            "pack_wait "
            '(did you mean "attempts"?)'
        ),
        (
            "jobs.yaml: jobs.nightly-export.colour is not a known key; allowed: args, chunk, "
            "clear_args, command, deadline, description, env, items, labels, limits, name, "
            "options, overrides, params, priority, receipt, retry, start_timeout, success, target, "
            "timeout"
        ),
        (
            'jobs.yaml: jobs.nightly-export.target is "hre"; it must be a configured target: '
            'There, gone, here, lone (did you mean "here"?)'
        ),
        ('jobs.yaml: jobs.b.options.cpu is "lots"; it must be an integer'),
        "jobs.yaml: jobs.d is null; it must be a mapping that says the job's target and command",
        "jobs.yaml: jobs.e.target is missing; it is required",
        'jobs.yaml: jobs.e.name is "f" under the key "e"; both must be the same',
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("targets: {a: {", "jobs.yaml:1:15: is no YAML: expected the node content, but found "),
        ("a: *b", "jobs.yaml:1:4: is no YAML: found undefined alias 'b'"),
        ("a: !!python/name:os.system", "jobs.yaml:1:4: is no YAML: could not determine a constr"),
        ("a: \x00", "jobs.yaml: is no YAML: unacceptable character #x0000"),
        ("[" * 1000, "jobs.yaml: is no YAML: maximum recursion depth exceeded"),
        ("", "jobs.yaml: is empty; it must be a mapping with the keys targets and jobs"),
        ("[1]", "jobs.yaml: holds [1]; it must be a mapping with the keys targets and jobs"),
        ("{[a]: 1}", "jobs.yaml:1:2: is no YAML: found unhashable key"),
        ("targets: 5", "jobs.yaml: targets is 5; it must be a mapping of names to targets"),
        ("jobs: [{a: 1}]", 'jobs.yaml: jobs.0 is {"a": 1}; in a list it must have a name'),
        ("targets: {a: 5}", "jobs.yaml: targets.a is 5; it must be a mapping that says the targe"),
    ],
)
def test_a_file_of_another_form_is_refused_with_the_place(text: str, line: str) -> None:
    (said,) = problems_of_yaml(text)
    assert said.startswith(line)


def test_merged_keys_may_be_overridden() -> None:
    config = load_config(
        written(
            "targets: {here: {backend: fake}}\n"
            "jobs:\n"
            "  a: &a {target: here, command: [x], priority: 1}\n"
            "  b: &b {<<: *a, priority: 2}\n"
            "  c: {<<: [*b, *a], timeout: 5s}\n"
        )
    )
    assert [job.priority for job in config.jobs.values()] == [1, 2, 2]


def test_a_file_that_is_not_there_is_named() -> None:
    assert problems("no/jobs.yaml") == ["no/jobs.yaml: cannot be read: No such file or directory"]
    assert problems("nojobs") == [
        (
            "nojobs: there is no Python module nojobs here; for a file, "
            "give a path that ends in .yaml"
        )
    ]
    assert problems("no jobs") == [
        (
            '"no jobs" names no jobs; give the path of a YAML file, '
            'or "module" or "module:attribute" of Python'
        )
    ]


def test_any_file_that_exists_is_read_as_yaml() -> None:
    assert load_config(written('{"targets": {}, "jobs": {}}', "jobs.json")).jobs == {}


def test_a_job_in_yaml_may_repeat_its_name_and_wrong_options_wait_for_a_right_type() -> None:
    assert job_problems("{name: j, target: here, command: [x], options: 5}") == [
        "jobs.yaml: jobs.j.options is 5; it must be a mapping"
    ]
    assert job_problems("{target: 5, command: [x]}") == [
        "jobs.yaml: jobs.j.target is 5; it must be text: put it in quotes"
    ]
    assert job_problems("{target: here, command: [x], options: {cup: 1}}") == [
        (
            "jobs.yaml: jobs.j.options.cup is not a known key; allowed: cpu, mounts "
            '(did you mean "cpu"?)'
        )
    ]
    assert job_problems("{target: here, command: [x], options: {mounts: [{pth: /x}]}}") == [
        (
            "jobs.yaml: jobs.j.options.mounts.0.pth is not a known key; allowed: path "
            '(did you mean "path"?)'
        )
    ]
    assert job_problems("{target: here, command: [x], items: {source: 'a:b', tiemout: 1}}") == [
        (
            "jobs.yaml: jobs.j.items.tiemout is not a known key; allowed: source, timeout "
            '(did you mean "timeout"?)'
        )
    ]
    assert job_problems("{target: here, command: [x], options: &o {cpu: *o}}") == [
        "jobs.yaml: jobs.j.options is nested too deep; it must be at most 100 levels",
        ("jobs.yaml: jobs.j.options.cpu is a dict nested too deep to show; it must be an integer"),
    ]


def test_a_secret_is_not_shown_in_a_message() -> None:
    (line,) = job_problems("{target: here, command: [x], env: {API_TOKEN: 's3cret{'}}")
    assert line.startswith("jobs.yaml: jobs.j.env.API_TOKEN is ***; a template in it is wrong; ")
    assert "s3cret" not in line
    (line,) = problems_of_yaml("jobs: [{env: {API_TOKEN: s3cret}, day: 2024-02-29}]")
    assert line == (
        "jobs.yaml: jobs.0 is {'env': {'API_TOKEN': '***'}, 'day': datetime.date(2024, 2, 29)}; "
        "in a list it must have a name"
    )


# --- Python modules -------------------------------------------------------------------------------


def module(text: str, name: str = "shop_jobs") -> str:
    Path(f"{name}.py").write_text("from dispatcher.job import Job\n" + text)
    return name


def test_a_module_beside_the_caller_gives_lists_of_targets_and_jobs() -> None:
    path = list(sys.path)
    config = load_config(
        module(
            "targets = [{'name': 'here', 'backend': 'fake', 'region': 'us'}]\n"
            "jobs = [Job(name='a', target='here', command=('x',))]\n"
        )
    )
    assert config.jobs["a"] == Job(name="a", target="here", command=("x",))
    assert config.targets["here"].settings == FakeBackend.Settings(region="us")
    assert sys.path == path


def test_a_module_on_the_path_is_found_as_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_config(module("targets = jobs = {}\n")).targets == {}


def test_an_attribute_gives_a_mapping_or_a_config() -> None:
    name = module(
        "conf = {'targets': {'here': {'backend': 'fake'}},\n"
        "        'jobs': {'a': Job(name='a', target='here', command=('x',))}}\n"
    )
    config = load_config(f"{name}:conf")
    sys.modules[name].__dict__["again"] = config
    assert load_config(f"{name}:again").jobs == config.jobs


@pytest.mark.parametrize(
    ("key", "target", "line"),
    [
        (
            "a",
            Target(name="a", backend="fake", settings=FakeBackend.Options()),
            "targets.a.settings is a Options; it must be the fake backend's FakeBackend.Settings",
        ),
        (
            "a",
            Target(name="a", backend="none", settings=FakeBackend.Settings()),
            'targets.a.backend cannot be used: "none" is no known backend; known: fake',
        ),
        (
            "b",
            Target(name="a", backend="fake", settings=FakeBackend.Settings()),
            'targets.b.name is "a" under the key "b"; both must be the same',
        ),
    ],
)
def test_a_ready_target_must_fit_its_key_and_its_backend(
    monkeypatch: pytest.MonkeyPatch, key: str, target: Target, line: str
) -> None:
    ready = ModuleType("ready_jobs")
    ready.__dict__["targets"] = {key: target}
    monkeypatch.setitem(sys.modules, "ready_jobs", ready)
    assert problems("ready_jobs") == [f"ready_jobs: {line}"]


def test_what_is_wrong_with_parts_of_a_module_is_told_by_name() -> None:
    name = module(
        "targets = [{'name': 'here', 'backend': 'fake'}, {'name': 'here', 'backend': 'fake'}]\n"
        "job = Job(name='a', target='hre', command=('x',))\n"
        "jobs = {'a': job, 'b': job, 'c': {'target': 'here', 'command': 'x'}}\n"
    )
    assert problems(name) == [
        "shop_jobs: targets.here is given twice; leave one out",
        (
            'shop_jobs: jobs.a.target is "hre"; it must be a configured target: here '
            '(did you mean "here"?)'
        ),
        'shop_jobs: jobs.b.name is "a" under the key "b"; both must be the same',
        'shop_jobs: jobs.c.command is "x"; it must be a list',
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "jobs = [\n  Job(name='a', target='here', command=('x',), timeout='4x'),\n]\n",
            [
                (
                    'shop_jobs: shop_jobs.py:3: Job: timeout is "4x"; it must be a duration such '
                    "as 90s, 10m, 1h30m or 2d, or a number of seconds"
                )
            ],
        ),
        (
            "import no_such_thing\n",
            [
                (
                    "shop_jobs: shop_jobs.py:2: importing it failed: "
                    "ModuleNotFoundError: No module named 'no_such_thing'"
                )
            ],
        ),
        (
            "1 / 0\n",
            ["shop_jobs: shop_jobs.py:2: importing it failed: ZeroDivisionError: division by zero"],
        ),
        ("x = 1\n", ["shop_jobs: has neither targets nor jobs; it must have both"]),
    ],
)
def test_a_module_that_cannot_be_used_says_where(text: str, lines: list[str]) -> None:
    assert problems(module(text)) == lines


def test_a_missing_attribute_is_named() -> None:
    assert problems(f"{module('')}:conf") == ["shop_jobs:conf: the module shop_jobs has no conf"]


class Choosy(BaseModel):
    insecure: bool | Literal["anywhere"] = False
    names: dict[str, int] = {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"insecure": "maybe"}, ["insecure is \"maybe\"; it must be true or false, or 'anywhere'"]),
        (
            {"insecure": 3, "names": {"a": "x", "b": "x"}},
            [
                "insecure is 3; it must be true or false, or 'anywhere'",
                'names.a is "x"; it must be an integer',
                'names.b is "x"; it must be an integer',
            ],
        ),
    ],
)
def test_a_value_that_is_none_of_several_kinds_is_told_once_under_its_own_name(
    given: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        Choosy.model_validate(given)
    assert list(map(str, problems_of(caught.value, Choosy))) == said


# --- the registry ---------------------------------------------------------------------------------


def test_a_backend_is_made_from_its_target() -> None:
    target = Target(name="here", backend="fake", settings=FakeBackend.Settings())
    made = registry.make_backend(target)
    assert isinstance(made, FakeBackend)
    assert (made.name, made.settings) == ("here", target.settings)


def test_a_backend_whose_package_is_missing_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry.BACKENDS, "ecs_two", "no_such_cloud:Ecs")
    with pytest.raises(ConfigurationError) as caught:
        registry.backend_class("ecs_two")
    assert str(caught.value) == (
        "the backend \"ecs_two\" cannot be imported (No module named 'no_such_cloud'); "
        "to install what it needs: in a checkout of dispatcher, pip install '.[ecs-two]'"
    )


def test_a_registration_of_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "odd", "fake_backend:Odd")
    with pytest.raises(ConfigurationError, match="is registered as fake_backend:Odd, which does"):
        registry.backend_class("odd")


def test_another_distribution_adds_a_backend_by_an_entry_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "acme_cloud-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-cloud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dispatcher.backends]\nacme = fake_backend:FakeBackend\nbroken = no_such_cloud:X\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert registry.known_backends() == ("acme", "broken", "fake")
    assert registry.backend_class("acme").__name__ == "FakeBackend"
    with pytest.raises(ConfigurationError, match="pip install 'acme-cloud'"):
        registry.backend_class("broken")


def test_a_backend_gives_limits_to_targets_that_say_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeBackend, "DEFAULTS", {"reads_per_minute": 300, "max_running": 1000})
    source = written("targets: {here: {backend: fake, max_running: 5}}")
    target = load_config(source).targets["here"]
    assert (target.reads_per_minute, target.max_running) == (300, 5)


def test_a_program_that_a_target_cannot_set_is_refused_when_the_job_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeBackend, "COMMAND", "refused")
    source = written(
        "targets: {here: {backend: fake}}\n"
        "jobs: {a: {target: here, command: [sh]}, b: {target: here}}"
    )
    (line,) = problems(source)
    assert line == (
        "jobs.yaml: jobs.a.command is [\"sh\"]; target 'here' cannot set the program of an "
        "execution: put it into the definition, and args here"
    )


def test_a_job_without_a_program_is_refused_where_one_is_needed() -> None:
    source = written("targets: {here: {backend: fake}}\njobs: {a: {target: here}}")
    (line,) = problems(source)
    assert line == "jobs.yaml: jobs.a.command is missing; it must say the program to run"

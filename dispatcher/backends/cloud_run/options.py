"""What a target and a job may say of Cloud Run: the place, and the job with its definition."""

from __future__ import annotations

import ipaddress
import re
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from dispatcher.backends.cloud_run.names import RESERVED_NAMES, RESERVED_PREFIXES
from dispatcher.durations import Duration, format_duration

__all__ = [
    "LONGEST_TIMEOUT",
    "MAX_TASKS",
    "CloudRunOptions",
    "CloudRunSettings",
    "DefinitionBlock",
    "VpcBlock",
    "reserved",
]

MAX_TASKS: Final = 10_000
"""Tasks of one execution at most [D: quotas]."""

LONGEST_TIMEOUT: Final = timedelta(hours=168)
"""A task may be given at most so long [D: task timeout]."""

SHORTEST: Final = timedelta(seconds=1)

_PROJECT: Final = re.compile(r"(?:[a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]|[0-9]{6,20}")
_REGION: Final = re.compile(r"[a-z]+-[a-z]+[0-9]+")
_JOB: Final = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
_ENDPOINT: Final = re.compile(
    r"(?:https?://)?(?P<host>\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+)(?::[0-9]+)?/?"
)
_ACCOUNT: Final = re.compile(r"[a-z0-9-]+@[a-z0-9.-]+")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET: Final = re.compile(
    r"(?:projects/[a-z0-9.:-]+/secrets/)?[A-Za-z0-9_-]{1,255}(?::(?:latest|[0-9]+|[A-Za-z][\w-]*))?"
)
_LABEL: Final = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LABEL_VALUE: Final = re.compile(r"[a-z0-9_-]{0,63}")
_MEMORY: Final = re.compile(r"([1-9][0-9]*)(Mi|Gi|M|G)")
_UNITS: Final = {"Mi": 2**20, "Gi": 2**30, "M": 10**6, "G": 10**9}
_LEAST_MEMORY: Final = {"4": "2Gi", "8": "4Gi"}
"""What so many cpu need [C: ResourceRequirements.limits; D: cpu]."""

_MOST_MEMORY: Final = {"1": "4Gi", "2": "8Gi", "4": "16Gi", "8": "32Gi"}
"""What so many cpu may have [D: cloud.google.com/run/docs/configuring/jobs/memory-limits]."""


def reserved(name: str) -> bool:
    """Whether a variable of this name is Cloud Run's own."""
    return name in RESERVED_NAMES or name.startswith(RESERVED_PREFIXES)


def _check_project(project: str) -> str:
    if not _PROJECT.fullmatch(project):
        raise ValueError("must be a project's id, such as my-project-123, or its number")
    return project


def _check_region(region: str) -> str:
    if not _REGION.fullmatch(region):
        raise ValueError("must be a region, such as europe-west1")
    return region


def _check_job(job: str) -> str:
    if not _JOB.fullmatch(job):
        raise ValueError(
            "must be the name of a Cloud Run job alone, such as etl: a lower-case letter, then "
            "lower-case letters, digits and '-', no '-' at the end, at most 63 in all; project and "
            "region are the target's"
        )
    return job


def _check_account(account: str) -> str:
    if not _ACCOUNT.fullmatch(account):
        raise ValueError(
            "must be a service account's email, such as runner@my-project.iam.gserviceaccount.com"
        )
    return account


def _check_env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        raise ValueError("must be a variable's name: letters, digits and '_', and no digit first")
    if reserved(name):
        raise ValueError(
            f"must not be {', '.join(RESERVED_NAMES)}, or begin with "
            f"{' or '.join(RESERVED_PREFIXES)}: they are Cloud Run's"
        )
    if name.startswith("DISPATCH_"):
        raise ValueError("must not begin with DISPATCH_: the dispatcher sets those itself")
    return name


def _check_secret(reference: str) -> str:
    if not _SECRET.fullmatch(reference):
        raise ValueError(
            'must name a secret of Secret Manager and its version, such as "db-password:3" or '
            '"projects/other/secrets/db-password:latest"; never the secret itself'
        )
    return reference


def _check_memory(memory: str) -> str:
    if not _MEMORY.fullmatch(memory):
        raise ValueError("must be an amount such as 512Mi or 2Gi")
    return memory


def _bytes(memory: str | None) -> int:
    match = _MEMORY.fullmatch(memory or "512Mi")
    return int(match[1]) * _UNITS[match[2]] if match else 0


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    for name, value in labels.items():
        if not _LABEL.fullmatch(name) or not _LABEL_VALUE.fullmatch(value):
            raise ValueError(
                f'must have lower-case letters, digits, "_" and "-", at most 63, in names and '
                f"values; {name}: {value} has not"
            )
    return labels


JobName: TypeAlias = Annotated[str, AfterValidator(_check_job)]
Account: TypeAlias = Annotated[str, AfterValidator(_check_account)]
EnvName: TypeAlias = Annotated[str, AfterValidator(_check_env_name)]


class _Value(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")


class CloudRunSettings(_Value):
    """What a target with `backend: cloud_run` may set."""

    project: Annotated[str, AfterValidator(_check_project)] = Field(
        description="the Google Cloud project, by its id"
    )
    region: Annotated[str, AfterValidator(_check_region)] = Field(
        description="the region of the jobs, such as europe-west1"
    )
    endpoint: str | None = Field(
        default=None,
        description="host[:port] of the API; as a default Google's own. For an emulator, or a"
        " private endpoint",
    )
    logging_endpoint: str | None = Field(
        default=None,
        description="host[:port] of Cloud Logging; as a default Google's own, or with `insecure`"
        " that of `endpoint`",
    )
    transport: Literal["grpc", "rest"] = Field(
        default="grpc", description="how the API is spoken to; rest passes more proxies"
    )
    insecure: bool | Literal["anywhere"] = Field(
        default=False,
        description="true: plain text and no credentials, for an emulator on this machine;"
        ' "anywhere": on another machine too',
    )
    impersonate: Account | None = Field(
        default=None,
        description="a service account to act as; the workers' own account must be a token creator"
        " of it",
    )
    call_timeout: Duration = Field(
        default=timedelta(seconds=30), description="the longest that one call may take; 1s or more"
    )
    find_grace: Duration = Field(
        default=timedelta(seconds=60),
        description="how long after a lost launch its execution may still be missing in the list;"
        " 1s or more",
    )
    poll_interval: Duration = Field(
        default=timedelta(seconds=5), description="between two looks at an execution, at least"
    )
    tasks_interval: Duration = Field(
        default=timedelta(seconds=30),
        description="between two listings of the tasks of one running execution, at least",
    )
    keep: Duration = Field(
        default=timedelta(days=1),
        description="how long jobs that mode `strict` made are kept after their end; 1h or more."
        " Shorter where more than half of `max_jobs` are there",
    )
    max_jobs: int = Field(
        default=1000,
        ge=2,
        description="Cloud Run jobs that the region may hold, a quota; launches that make one wait"
        " where it is full",
    )

    @field_validator("endpoint", "logging_endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
            raise ValueError("must be host[:port], such as run.googleapis.com or 127.0.0.1:8123")
        return endpoint

    @field_validator("call_timeout", "find_grace")
    @classmethod
    def _check_second(cls, duration: timedelta) -> timedelta:
        if duration < SHORTEST:
            raise ValueError(f"must be 1s or longer, not {format_duration(duration)}")
        return duration

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, keep: timedelta) -> timedelta:
        if keep < timedelta(hours=1):
            raise ValueError(
                f"must be 1h or longer, not {format_duration(keep)}: an execution must stay there "
                "until a worker has recorded how it ended"
            )
        return keep

    @model_validator(mode="after")
    def _check_insecure(self) -> CloudRunSettings:
        given = [e for e in (self.endpoint, self.logging_endpoint) if e is not None]
        if self.insecure and self.endpoint is None:
            raise ValueError("must name an `endpoint` when `insecure` is set: Google has none")
        for endpoint in given:
            if not self.insecure and endpoint.startswith("http://"):
                raise ValueError(f"must set `insecure` too for the endpoint {endpoint}, or https")
            if self.insecure is True and not is_loopback(endpoint):
                raise ValueError(
                    f"must have an endpoint on this machine when `insecure` is true, not "
                    f"{endpoint}: everything would travel in plain text;"
                    ' write insecure: "anywhere" if it may'
                )
        if self.insecure and self.impersonate:
            raise ValueError("must not have `impersonate` with `insecure`: no credentials are sent")
        return self

    def address(self, service: Literal["run", "logging"]) -> str:
        """Give the host and port of a service, without a scheme."""
        given = self.endpoint
        if service == "logging":
            given = self.logging_endpoint or (self.endpoint if self.insecure else None)
        host = re.sub(r"^https?://", "", given or f"{service}.googleapis.com").rstrip("/")
        has_port = re.search(r":[0-9]+$", host) is not None
        return host if has_port else f"{host}:{80 if self.insecure else 443}"


def is_loopback(endpoint: str) -> bool:
    """Say whether an endpoint is surely on this machine."""
    match = _ENDPOINT.fullmatch(endpoint)
    host = match["host"].strip("[]") if match else ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class VpcBlock(_Value):
    """How the containers reach a network of the project."""

    connector: str | None = Field(default=None, description="a Serverless VPC Access connector")
    network: str | None = Field(default=None, description="the network, for direct VPC egress")
    subnetwork: str | None = Field(default=None, description="the subnetwork, for direct egress")
    tags: tuple[str, ...] = Field(default=(), description="network tags, for direct egress")
    egress: Literal["all-traffic", "private-ranges-only"] = Field(
        default="private-ranges-only", description="which traffic goes through it"
    )

    @model_validator(mode="after")
    def _check_choice(self) -> VpcBlock:
        direct = self.network is not None or self.subnetwork is not None
        if direct == (self.connector is not None):
            raise ValueError("must have either a connector, or a network or subnetwork")
        return self


class DefinitionBlock(_Value):
    """The Cloud Run job as it is wanted: what `dispatcher apply` creates or updates.

    Only what is set here is compared and written; the rest of the job is left as it is.
    """

    image: Annotated[str, Field(min_length=1)] = Field(description="the container image")
    command: tuple[str, ...] | None = Field(default=None, description="over the image's entrypoint")
    args: tuple[str, ...] | None = Field(default=None, description="where a job brings no args")
    cpu: Literal["1", "2", "4", "8"] | None = Field(default=None, description="1, 2, 4 or 8")
    memory: Annotated[str, AfterValidator(_check_memory)] | None = Field(
        default=None, description="such as 512Mi or 2Gi; 4 cpu need 2Gi or more, and 1 may have 4Gi"
    )
    service_account: Account | None = Field(default=None, description="who the containers are")
    vpc: VpcBlock | None = Field(default=None, description="the network that they reach")
    env: dict[EnvName, str] = Field(default={}, description="variables; never secrets")
    secrets: dict[EnvName, Annotated[str, AfterValidator(_check_secret)]] = Field(
        default={}, description="variables that hold secrets, by reference: {ENV: secret[:version]}"
    )
    labels: Annotated[dict[str, str], AfterValidator(_check_labels)] = Field(
        default={}, description="labels of the job"
    )
    parallelism: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TASKS,
        description="tasks of an execution at once; 0: as many as it can",
    )
    max_retries: int = Field(
        default=0, ge=0, le=10, description="retries by Cloud Run itself; 0, as retries are ours"
    )
    timeout: Duration | None = Field(
        default=None, description="of a task, where a run does not say; every run of ours does"
    )

    @field_validator("cpu", mode="before")
    @classmethod
    def _read_cpu(cls, cpu: Any) -> Any:
        return str(cpu) if isinstance(cpu, int) and not isinstance(cpu, bool) else cpu

    @model_validator(mode="after")
    def _check(self) -> DefinitionBlock:
        both = self.env.keys() & self.secrets.keys()
        if both:
            raise ValueError(f"must have {', '.join(sorted(both))} in env or in secrets, not both")
        least = _LEAST_MEMORY.get(self.cpu or "")
        if least is not None and _bytes(self.memory) < _bytes(least):
            raise ValueError(
                f"must have memory of {least} or more with {self.cpu} cpu, not "
                f"{self.memory or 'the default, 512Mi'}"
            )
        most = _MOST_MEMORY[self.cpu or "1"]
        if _bytes(self.memory) > _bytes(most):
            raise ValueError(
                f"must have memory of {most} at most with {self.cpu or 'the default of 1'} cpu, "
                f"not {self.memory}; Cloud Run allows {_MOST_MEMORY['8']}, with 8 cpu"
            )
        if self.timeout is not None and self.timeout > LONGEST_TIMEOUT:
            raise ValueError("must have a timeout of 168h at most")
        return self


class CloudRunOptions(_Value):
    """What a job may set in `options` for a Cloud Run target."""

    job: JobName = Field(description="the Cloud Run job to run; it exists, or `apply` makes it")
    container: str | None = Field(
        default=None, description="which container args and env are for, if the job has several"
    )
    max_tasks: int = Field(
        default=1, ge=1, le=MAX_TASKS, description="chunks packed in one execution, a task each"
    )
    parallelism: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TASKS,
        description="tasks at once, as the definition has it; as a default it is read there",
    )
    mode: Literal["shared", "strict", "mixed"] = Field(
        default="shared",
        description="shared: every execution is one of `job`; strict: each launch makes a job of"
        " its own from it, under a name that cannot be taken twice; mixed: shared, but strict for"
        " an execution with fewer tasks than the job's parallelism, which Cloud Run refuses else",
    )
    wrapped: bool = Field(
        default=False,
        description="the image's entrypoint is our entry wrapper: packs may use templates that"
        " differ from chunk to chunk",
    )
    signed_urls: bool = Field(
        default=False,
        description="input document, receipt and progress are given as signed https:// URLs, for"
        " images without a cloud SDK; there is no claim, and a pack has 500 chunks at most",
    )
    definition: DefinitionBlock | None = Field(
        default=None, description="the job as `dispatcher apply` is to make it"
    )

    @model_validator(mode="after")
    def _check(self) -> CloudRunOptions:
        fixed = None if self.definition is None else self.definition.parallelism
        if self.parallelism is not None and fixed not in (None, self.parallelism):
            raise ValueError(
                f"must say one parallelism: options has {self.parallelism} and the definition "
                f"{fixed}; leave the first out"
            )
        return self

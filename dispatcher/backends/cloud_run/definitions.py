"""From a job's `definition` block to a Cloud Run job, and what of it differs. Pure.

Only what the block sets is compared and written: a label, a variable or a volume that somebody
added in the console or by Terraform stays.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from google.cloud import run_v2

from dispatcher.backends.base import Change
from dispatcher.backends.cloud_run.options import CloudRunOptions, DefinitionBlock
from dispatcher.durations import format_duration
from dispatcher.redaction import MASK, is_secret_name

__all__ = ["differences", "written"]

_EGRESS: Final = {
    "all-traffic": run_v2.VpcAccess.VpcEgress.ALL_TRAFFIC,
    "private-ranges-only": run_v2.VpcAccess.VpcEgress.PRIVATE_RANGES_ONLY,
}
_EGRESS_WORDS: Final = {value: word for word, value in _EGRESS.items()}


def differences(options: CloudRunOptions, live: run_v2.Job | None) -> list[Change]:
    """Compare the block, field by field, with the job as it is; with nothing if there is none."""
    block = options.definition
    if block is None:
        return []
    wanted = _fields(written(options, live), options)
    present = {} if live is None else _fields(live, options)
    return [
        Change(path, present.get(path), value)
        for path, value in wanted.items()
        if _is_set(path, block) and present.get(path) != value
    ]


def written(options: CloudRunOptions, live: run_v2.Job | None) -> run_v2.Job:
    """Write the job as it is wanted, upon the job as it is."""
    block = options.definition
    if block is None:
        raise TypeError("there is no definition to write")
    job = run_v2.Job() if live is None else run_v2.Job.deserialize(run_v2.Job.serialize(live))
    for name, text in block.labels.items():
        job.labels[name] = text
    execution, task = job.template, job.template.template
    if block.parallelism is not None:
        execution.parallelism = block.parallelism
        # It must be at most the number of tasks, also of the definition [C: Execution.parallelism].
        execution.task_count = max(execution.task_count, block.parallelism, 1)
    task.max_retries = block.max_retries
    if block.timeout is not None:
        task.timeout = block.timeout
    if block.service_account is not None:
        task.service_account = block.service_account
    if block.vpc is not None:
        task.vpc_access = _vpc(block)
    _write_container(_container(job, options), block)
    return job


def _container(job: run_v2.Job, options: CloudRunOptions) -> Any:
    """Find the container that the block is of; make it in a job that has none."""
    containers = job.template.template.containers
    for container in containers:
        if options.container in (None, container.name):
            return container
    containers.append(run_v2.Container(name=options.container or ""))
    return containers[-1]


def _write_container(container: Any, block: DefinitionBlock) -> None:
    container.image = block.image
    if block.command is not None:
        container.command = list(block.command)
    if block.args is not None:
        container.args = list(block.args)
    if block.cpu is not None:
        container.resources.limits["cpu"] = block.cpu
    if block.memory is not None:
        container.resources.limits["memory"] = block.memory
    ours = {name: run_v2.EnvVar(name=name, value=text) for name, text in block.env.items()}
    for name, reference in block.secrets.items():
        secret, _, version = reference.partition(":")
        ours[name] = run_v2.EnvVar(
            name=name,
            value_source=run_v2.EnvVarSource(
                secret_key_ref=run_v2.SecretKeySelector(secret=secret, version=version or "latest")
            ),
        )
    if ours:
        kept = [ours.pop(variable.name, variable) for variable in container.env]
        container.env = [*kept, *ours.values()]


def _vpc(block: DefinitionBlock) -> run_v2.VpcAccess:
    vpc = block.vpc
    if vpc is None:
        raise TypeError("there is no vpc to write")
    access = run_v2.VpcAccess(egress=_EGRESS[vpc.egress])
    if vpc.connector is not None:
        access.connector = vpc.connector
    else:
        access.network_interfaces = [
            run_v2.VpcAccess.NetworkInterface(
                network=vpc.network or "", subnetwork=vpc.subnetwork or "", tags=list(vpc.tags)
            )
        ]
    return access


def _fields(job: run_v2.Job, options: CloudRunOptions) -> dict[str, Any]:
    """Lay a job out as paths and values, as far as a block could set them."""
    execution, task = job.template, job.template.template
    fields: dict[str, Any] = {f"labels.{name}": text for name, text in job.labels.items()}
    # Zero retries and none said differ: the latter is three [C]. The field tells them apart.
    said = run_v2.TaskTemplate.pb(task).HasField("max_retries")
    fields |= {
        "parallelism": execution.parallelism,
        "max_retries": task.max_retries if said else None,
        "timeout": _duration(task),
        "service_account": task.service_account or None,
    }
    access = task.vpc_access
    if access.connector or access.network_interfaces:
        fields["vpc.egress"] = _EGRESS_WORDS.get(access.egress)
        fields["vpc.connector"] = access.connector or None
        for interface in access.network_interfaces:
            fields["vpc.network"] = interface.network or None
            fields["vpc.subnetwork"] = interface.subnetwork or None
            fields["vpc.tags"] = list(interface.tags) or None
    container = _container(job, options)
    at = f"containers.{container.name or 0}"
    fields |= {
        f"{at}.image": container.image or None,
        f"{at}.command": list(container.command),
        f"{at}.args": list(container.args),
        f"{at}.cpu": container.resources.limits.get("cpu"),
        f"{at}.memory": container.resources.limits.get("memory"),
    }
    for variable in container.env:
        fields[f"{at}.env.{variable.name}"] = _shown(variable)
    return fields


def _duration(task: Any) -> str | None:
    timeout = task.timeout
    return format_duration(timeout) if timeout and timeout > timedelta(0) else None


def _shown(variable: Any) -> str:
    """Write a variable for people: a reference as such, and nothing that looks like a secret."""
    reference = variable.value_source.secret_key_ref
    if reference.secret:
        return f"secret {reference.secret}:{reference.version or 'latest'}"
    return MASK if is_secret_name(variable.name) else variable.value


def _is_set(path: str, block: DefinitionBlock) -> bool:
    """Whether the block says anything of a path."""
    head, *rest = path.split(".", 2)
    if head == "labels":
        return ".".join(rest) in block.labels
    if head == "vpc":
        return block.vpc is not None
    if head != "containers":
        return head == "max_retries" or getattr(block, head) is not None
    field = rest[-1]
    if field.startswith("env."):
        return field.removeprefix("env.") in {*block.env, *block.secrets}
    return getattr(block, field) is not None

"""What to run: the frozen, validated value that a batch keeps a copy of.

A `Job` names a target and says what its containers are given, how items become chunks, and what
happens when a chunk fails. It knows no database and no backend; `config.py` checks its `options`
against the backend of its target.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dispatcher.durations import Duration, format_duration, parse_duration
from dispatcher.errors import InvalidInput
from dispatcher.params import check_schema, copy_json, defaults, schema_problems
from dispatcher.problems import Path, Problem, Problems, shown
from dispatcher.redaction import MASK
from dispatcher.templating import RULES, check_template, is_plain, params_used

__all__ = [
    "PRIORITIES",
    "Chunking",
    "Count",
    "Duration",
    "EnvName",
    "ItemSource",
    "Job",
    "Limits",
    "Name",
    "Overrides",
    "RetryPolicy",
    "SuccessPolicy",
    "Text",
    "format_duration",
    "parse_duration",
]

PRIORITIES: Final = (-100, 100)
"""The lowest and the highest priority."""

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED: Final = "DISPATCH_"
_LARGEST_EXIT_CODE: Final = 255
_CALLABLE: Final = re.compile(r"[^:\s]+:[^:\s]+")
_MISPLACED: Final = re.compile(r"\{(?:items|param):[^{}]*\}")


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            "must begin with a lower-case letter and go on with lower-case letters, digits "
            "and '-', at most 40 in all"
        )
    return name


def _check_text(text: str) -> str:
    if not is_plain(text):
        raise ValueError("must have no NUL character and no half of a surrogate pair")
    return text


def _check_callable(text: str) -> str:
    parts = text.replace(":", ".").split(".")
    if not _CALLABLE.fullmatch(text) or not all(part.isidentifier() for part in parts):
        raise ValueError('must be "module:function", such as "shop.tables:list_tables"')
    return text


def _check_env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        raise ValueError("must be a variable's name: letters, digits and '_', and no digit first")
    if name.startswith(_RESERVED):
        raise ValueError(f"must not begin with {_RESERVED}: the dispatcher sets those itself")
    return name


def _check_syntax(text: str) -> str:
    try:
        check_template(text, param_names=None)
    except InvalidInput as error:
        unsaid = f"is {MASK}; a template in it is wrong; {RULES}"
        raise Problems([Problem((), f"is {shown(text)}; {error}", unsaid)]) from error
    return text


def _check_command(command: tuple[str, ...]) -> tuple[str, ...]:
    if not command:
        raise ValueError("must have at least one word, the program")
    for index, word in enumerate(command):
        misplaced = _MISPLACED.search(word)
        if misplaced:
            where = f"is {shown(word)}; {misplaced.group()} is filled in args and env only"
            raise Problems([Problem((index,), f"{where}: move it to args")])
    if not command[0]:
        raise Problems([Problem((0,), 'is ""; it must name a program')])
    return command


def _read_exit_code(value: object) -> int:
    """Let a code be text too, as JSON writes the keys of a mapping."""
    digits = re.fullmatch(r"[0-9]{1,3}", value if isinstance(value, str) else repr(value))
    if digits is None or not 1 <= int(digits.group()) <= _LARGEST_EXIT_CODE:
        raise ValueError(f"must be an exit code from 1 to {_LARGEST_EXIT_CODE}")
    return int(digits.group())


Name: TypeAlias = Annotated[str, AfterValidator(_check_name)]
"""A lower-case letter, then lower-case letters, digits and '-'; at most 40."""

Text: TypeAlias = Annotated[str, AfterValidator(_check_text)]
"""Text that can be stored and handed to a program."""

Template: TypeAlias = Annotated[Text, AfterValidator(_check_syntax)]
"""Text in which `templating` fills what stands in braces."""

EnvName: TypeAlias = Annotated[str, AfterValidator(_check_env_name)]
ExitCode: TypeAlias = Annotated[int, BeforeValidator(_read_exit_code)]

Count: TypeAlias = Annotated[int, Strict(), Field(ge=1)]
"""A whole number of at least 1; text is not taken for one."""

JsonObject: TypeAlias = Annotated[dict[str, Any], AfterValidator(copy_json)]
"""A mapping that JSON gives back unchanged; copied, so that the caller's can change."""


class _Value(BaseModel):
    """What all parts of a job have in common: frozen, and no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ItemSource(_Value):
    """A function that yields a batch's items when the batch is planned, in a process of its own."""

    source: Annotated[str, AfterValidator(_check_callable)]
    """"module:function"; only the form is checked here, as the caller need not have the module."""

    timeout: Duration = timedelta(minutes=10)


class Chunking(_Value):
    """How items become chunks: exactly one of `size`, `count` and `max_items`."""

    size: Count | None = None
    """Items a chunk, in their order; the last may have fewer."""

    count: Count | None = None
    """The number of chunks."""

    max_items: Count | None = None
    """Items a chunk at most."""

    balance_by: Annotated[str, Field(min_length=1)] | None = None
    """A numeric field of each item, such as its bytes, whose sum is to be much alike in all chunks.
    Goes with `count` or `max_items`."""

    @model_validator(mode="after")
    def _check_choice(self) -> Chunking:
        given = [name for name in ("size", "count", "max_items") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) if given else "none of them"
            raise ValueError(f"must have exactly one of size, count and max_items, and has {said}")
        if self.balance_by is not None and self.size is not None:
            raise ValueError("must have no balance_by beside size: take count or max_items")
        return self


class RetryPolicy(_Value):
    """When a chunk is tried again. Waits grow from `initial` by `factor` up to `max`."""

    attempts: Count = 3
    """Tries at a chunk that the application may fail, the first included."""

    infrastructure_attempts: Count = 5
    """Tries at a chunk that may end as preempted, lost, start_failed or suspect."""

    on_failure: Literal["fail", "split"] = "fail"
    """What becomes of a chunk that has used up its attempts. `split`: its items go on in two
    smaller chunks, and these again, until what cannot be done stands alone."""

    initial: Duration = timedelta(seconds=30)
    factor: Annotated[float, Strict(), AllowInfNan(allow_inf_nan=False), Field(ge=1)] = 2.0
    max: Duration = timedelta(minutes=10)
    jitter: Annotated[bool, Strict()] = True
    """Wait anything from nothing to the full time, so that retries do not come all at once."""

    exit_codes: dict[ExitCode, Literal["retry", "fail"]] = Field(default={})
    """What an exit code from 1 to 255 means: `fail` is final, `retry` is the default."""

    pack_wait: Duration = timedelta(seconds=30)
    """How long retries of a packed execution wait for company."""

    @model_validator(mode="after")
    def _check_max(self) -> RetryPolicy:
        if self.max < self.initial:
            text = f"is {format_duration(self.max)}; it must be at least `initial`"
            raise Problems([Problem(("max",), f"{text}, {format_duration(self.initial)}")])
        return self


class Limits(_Value):
    """How much of a job may run at once, in slots; None is no limit of its own."""

    running: Count | None = None
    """Slots of this job over all its batches."""

    per_batch: Count | None = None
    """Slots of each batch."""


class SuccessPolicy(_Value):
    """When a batch whose chunks are all final has succeeded: at most one of the three bounds.

    Without any, no chunk may fail. An item has failed if its chunk is final and it did not succeed.
    """

    max_failed_chunks: Annotated[int, Strict(), Field(ge=0)] | None = None
    max_failed_items: Annotated[int, Strict(), Field(ge=0)] | None = None
    min_ratio: Annotated[float, AllowInfNan(allow_inf_nan=False), Field(ge=0, le=1)] | None = None
    """The part of the items that must succeed, such as 0.95."""

    stop_early: Annotated[bool, Strict()] | None = None
    """Stop what is left as soon as the policy can no longer be met. Not given: yes where some
    failures are allowed; no where none is, as the other chunks' work is then wanted all the
    same."""

    @model_validator(mode="after")
    def _check_choice(self) -> SuccessPolicy:
        bounds = ("max_failed_chunks", "max_failed_items", "min_ratio")
        given = [name for name in bounds if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"must have one bound at most, and has {' and '.join(given)}")
        return self

    @property
    def stops_early(self) -> bool:
        """Whether a batch is stopped once it cannot succeed any more."""
        if self.stop_early is not None:
            return self.stop_early
        some = self.min_ratio is not None and self.min_ratio < 1
        return bool(self.max_failed_chunks or self.max_failed_items or some)


class Overrides(_Value):
    """What a batch may set over its job by `enqueue(..., overrides={...})`; nothing unless said.

    It is the fence around what callers of an application can reach: `overriding.py` keeps it.
    """

    args: Annotated[bool, Strict()] = False
    """Whether a batch may bring its own arguments, in place of all of `args`."""

    env: tuple[EnvName, ...] = ()
    """The variables that a batch may set, over those of `env`."""

    timeout: Duration | None = None
    """The longest `timeout` that a batch may ask for; none: it may not ask."""

    tasks: Count | None = None
    """The most chunks that a batch may ask to be cut into; none: it may not ask."""


_Texts = TypeVar("_Texts", tuple[str, ...], dict[str, str])


class Job(_Value):
    """What to run, where, and what to do when it fails.

    Stored with each batch: `Job.model_validate(job.model_dump(mode="json"))` is the same job.
    """

    name: Name
    target: Annotated[str, Field(min_length=1)]
    description: Text | None = None

    command: Annotated[tuple[Text, ...], AfterValidator(_check_command)] = ()
    """The program and its fixed arguments; not a template. Some targets need it, and others have it
    in a definition of their own: `config.py` checks that."""

    # Before `args` and `env`, whose check reads it.
    params: Annotated[JsonObject, AfterValidator(check_schema)] | None = None
    """The JSON schema of the params; None if the job takes none."""

    args: tuple[Template, ...] = ()
    """Further arguments, as templates."""

    clear_args: Annotated[bool, Strict()] = False
    """Run without arguments, also where the target's own definition has some. Else, without `args`,
    the definition's stay. A batch that overrides `args` by an empty list sets it."""

    env: dict[EnvName, Template] = Field(default={})
    """Variables of the container; the values are templates."""

    items: ItemSource | None = None
    """Where the items come from when `enqueue` is given none."""

    chunk: Chunking = Chunking(size=1)
    timeout: Duration = timedelta(hours=1)
    """The longest that one task may run."""

    start_timeout: Duration = timedelta(minutes=10)
    """The longest from the launch until the first task runs."""

    retry: RetryPolicy = RetryPolicy()
    limits: Limits = Limits()
    deadline: Duration = timedelta(hours=24)
    """The longest that a batch may take; then what is left of it fails."""

    success: SuccessPolicy = SuccessPolicy()

    receipt: Literal["ignored", "optional", "required"] = "optional"
    """What a task's receipt is to us. `required`: exit code 0 without a complete receipt is no
    success. `optional`: it counts where there is one. `ignored`: none is looked for."""
    overrides: Overrides = Overrides()
    options: JsonObject = Field(default={})
    """What the target's backend is told beside; `config.py` checks it against its `Options`."""

    priority: Annotated[int, Strict(), Field(ge=PRIORITIES[0], le=PRIORITIES[1])] = 0
    """Higher goes first."""

    labels: dict[Text, Text] = Field(default={})

    @field_validator("clear_args")
    @classmethod
    def _check_clear_args(cls, clear: bool, info: ValidationInfo) -> bool:
        if clear and info.data.get("args"):
            raise ValueError("must be left out where there are `args`: they replace a definition's")
        return clear

    @field_validator("args", "env")
    @classmethod
    def _check_params_used(cls, value: _Texts, info: ValidationInfo) -> _Texts:
        if "params" not in info.data:  # wrong itself, and told so
            return value
        names = _declared(info.data["params"])
        problems = []
        for key, text in value.items() if isinstance(value, dict) else enumerate(value):
            try:
                check_template(text, param_names=names)
            except InvalidInput as error:
                problems.append(Problem((key,), f"is {shown(text, (key,))}; {error}"))
        if problems:
            raise Problems(problems)
        return value

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check the params of a batch and return a copy with the schema's defaults filled in.

        Defaults are those of the schema's own `properties`. A param that `args` or `env` use must
        then be there, required or not.

        Raises:
            InvalidInput: naming each param that is wrong, its value and what is allowed.
        """
        if self.params is None:
            if params:
                names = ", ".join(sorted(map(str, params)))
                raise InvalidInput(
                    f"the job {self.name!r} takes no params, and was given {names}; leave them out "
                    "or declare them in the job's `params`, a JSON schema"
                )
            return {}
        try:
            given: dict[str, Any] = copy_json({} if params is None else params)
        except Problems as error:
            raise self._wrong_params(error.problems) from error
        if not isinstance(given, dict):
            raise self._wrong_params([Problem((), f"is {shown(given)}; it must be a mapping")])
        filled = {**defaults(self.params), **given}
        problems = [*schema_problems(self.params, filled), *self._missing_params(filled)]
        if problems:
            raise self._wrong_params(problems)
        return filled

    def _wrong_params(self, problems: Iterable[Problem]) -> InvalidInput:
        lines = dict.fromkeys(str(problem.under("params")) for problem in problems)
        return InvalidInput(f"the job {self.name!r} cannot run so: {'; '.join(lines)}")

    def _missing_params(self, given: Mapping[str, Any]) -> Iterator[Problem]:
        required = (self.params or {}).get("required", ())
        for path, text in self._templates():
            for name in sorted(params_used(text) - given.keys() - set(required)):
                where = ".".join(map(str, path))
                yield Problem((name,), f"is missing; the job's {where} uses it")

    def _templates(self) -> Iterator[tuple[Path, str]]:
        for index, text in enumerate(self.args):
            yield ("args", index), text
        for name, text in self.env.items():
            yield ("env", name), text


def _declared(schema: dict[str, Any] | None) -> frozenset[str] | None:
    """Name the params that templates may use; None if the schema leaves them open."""
    if schema is None:
        return frozenset()
    composed = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties", "if"}
    if "properties" not in schema or composed & schema.keys():
        return None
    return frozenset(schema["properties"])

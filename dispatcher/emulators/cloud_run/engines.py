"""`Engine`: a container engine of this machine, by its own command line.

Docker and Podman take the same words, but for what they tell of themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from dispatcher.errors import ConfigurationError, Unreachable

__all__ = ["Engine", "EngineFailed", "EngineName", "kill_call", "last_words"]

CALL_SECONDS: Final = 30.0
"""The longest that a call may take that is not one to wait for a container or a registry."""

GREETING_SECONDS: Final = 20.0
"""The longest that the engine may take to say that it is there."""


class EngineName(StrEnum):
    """The engines that are known, by the names of their commands."""

    DOCKER = "docker"
    PODMAN = "podman"


FACTS: Final[Mapping[EngineName, str]] = {
    EngineName.DOCKER: '{"cpus": {{.NCPU}}, "memory": {{.MemoryLimit}}, "cpu": {{.CPUCfsQuota}}}',
    EngineName.PODMAN: '{"cpus": {{.Host.CPUs}}, "controllers": {{json .Host.CgroupControllers}}}',
}
"""What to ask an engine for, as a template of its command `info`."""

NO_IMAGE: Final = ("no such image", "image not known", "invalid reference format")
"""What Docker, Podman and both say of an image that they do not have, in lower case."""


class EngineFailed(Exception):
    """A call failed; the text is the engine's words."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that has answered."""

    name: EngineName
    path: str
    """Of its command."""

    cpus: int
    """What a container can be given at most."""

    limits: frozenset[str]
    """What of "memory" and "cpu" it can limit: not everything where it does not run as root."""

    @classmethod
    def reach(cls, name: EngineName) -> Engine:
        """Find an engine and ask it what it can do.

        Raises:
            ConfigurationError: its command is not installed.
            Unreachable: it does not answer.
        """
        path = shutil.which(name)
        if path is None:
            raise ConfigurationError(
                f"the engine {name} is not installed: there is no command {name!r} on PATH; "
                f"allowed: {', '.join(EngineName)}"
            )
        try:
            facts = json.loads(
                _call([path, "info", "--format", FACTS[name]], timeout=GREETING_SECONDS)
            )
        except (EngineFailed, ValueError) as error:
            raise Unreachable(
                f"the engine {name} does not answer: {error}; `{name} info` must work for this user"
            ) from error
        return cls(name, path, facts["cpus"], _limits(facts))

    def call(
        self,
        *words: str,
        text: str = "",
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> str:
        """Call the engine; returns what it says.

        Args:
            words: after the command's name.
            text: for its standard input.
            env: variables on top of the emulator's own, which the engine's command needs.
            pass_fds: open files that it inherits.

        Raises:
            EngineFailed: it refused, did not answer in time, or is not there any more.
        """
        return _call([self.path, *words], text=text, env=env, pass_fds=pass_fds)

    def open(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a call that may take long, and which leads a process group of its own.

        Raises:
            EngineFailed: the command could not be started.
        """
        try:
            return subprocess.Popen(
                [self.path, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineFailed(f"{self.path}: {error.strerror or error}") from error

    def has_image(self, image: str) -> bool:
        """Whether it has an image, without looking for it in a registry.

        Raises:
            EngineFailed: it cannot say.
        """
        try:
            self.call("image", "inspect", "--format", "{{.Id}}", "--", image)
        except EngineFailed as failed:
            # There is no code of its own for it, only words.
            if any(words in str(failed).lower() for words in NO_IMAGE):
                return False
            raise
        return True

    def state(self, container: str) -> Mapping[str, Any]:
        """Tell how a container is.

        Raises:
            EngineFailed: it cannot say, or there is no such container.
        """
        said = self.call("container", "inspect", "--format", "{{json .State}}", container)
        try:
            read: Mapping[str, Any] = json.loads(said)
        except ValueError as error:
            raise EngineFailed(f"{self.name} said of {container}: {said[:200]!r}") from error
        return read


def last_words(text: str) -> str:
    """Pick from what a call wrote to standard error why it failed, without progress and hints."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1]


def kill_call(popen: subprocess.Popen[bytes]) -> None:
    """End a call that takes long, at once."""
    try:
        os.killpg(popen.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # it has ended; macOS says so with the second one


def _limits(facts: Mapping[str, Any]) -> frozenset[str]:
    if "controllers" in facts:
        return frozenset(facts["controllers"] or ()) & {"memory", "cpu"}
    return frozenset(kind for kind in ("memory", "cpu") if facts[kind])


def _call(
    command: list[str],
    *,
    text: str = "",
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    timeout: float | None = None,
) -> str:
    timeout = timeout or CALL_SECONDS
    try:
        done = subprocess.run(
            command,
            input=text.encode(),
            env={**os.environ, **(env or {})},
            capture_output=True,
            pass_fds=pass_fds,
            start_new_session=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineFailed(f"{command[0]} {command[1]}: no answer in {timeout:g} s") from error
    except (OSError, ValueError) as error:  # the second for a NUL in a word or a variable
        raise EngineFailed(f"{command[0]} {command[1]}: {error}") from error
    if done.returncode:
        said = last_words(done.stderr.decode(errors="replace"))
        raise EngineFailed(said or f"{command[0]} {command[1]} ended with {done.returncode}")
    return done.stdout.decode(errors="replace").strip()

"""What Cloud Run has refused of a whole job, so that not each of its launches has to hear it anew.

A job that is not there, a permission or credentials that are missing: all chunks of a job meet
them, and three hundred calls say no more than one. What was refused holds for the other launches of
the job for a few seconds; then one of them asks again. While nothing is known, one asks ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Lock
from typing import Final

from dispatcher.backends.base import Rejected
from dispatcher.backends.cloud_run.failures import concerns_the_job

__all__ = ["KEPT", "Refusals"]

KEPT: Final = 10.0
"""Seconds for which a refusal stands without a call: what was mended is seen that soon."""

TAKEN: Final = 300.0
"""Seconds after another answer in which launches do not wait for one to ask ahead."""


@dataclass(slots=True)
class _Answer:
    """The last answer to a launch of one job. Times are of the process's monotonic clock."""

    changed: Condition = field(default_factory=Condition)
    taken: float = -math.inf
    refused: float = -math.inf
    words: str | None = None
    """Those of the refusal; None if the last answer was another one."""

    asking: bool = False
    """Whether one asks ahead."""


class Refusals:
    """The answers to launches, by job. May be used by any thread."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._lock = Lock()
        self._answers: dict[str, _Answer] = {}

    @contextmanager
    def asking(self, job: str, patience: float) -> Iterator[None]:
        """Make the calls of a launch; for `patience` seconds at most wait for one that asks ahead.

        Raises:
            Rejected: what was refused of the job a moment ago, and no call was made; or what the
                calls raised.
        """
        with self._lock:
            answer = self._answers.setdefault(job, _Answer())
        ahead = self._enter(answer, patience)
        words = None
        try:
            yield
        except Rejected as error:
            words = str(error) if concerns_the_job(error.__cause__) else None
            raise
        finally:
            with answer.changed:
                answer.words, now = words, self._monotonic()
                if words is None:
                    answer.taken = now
                else:
                    answer.refused, answer.taken = now, -math.inf
                if ahead:
                    answer.asking = False
                    answer.changed.notify_all()

    def _enter(self, answer: _Answer, patience: float) -> bool:
        """Whether this launch asks ahead of the others.

        Raises:
            Rejected: what was refused of the job a moment ago.
        """
        with answer.changed:
            self._refuse(answer)
            if self._monotonic() - answer.taken < TAKEN:
                return False
            if answer.asking:
                answer.changed.wait_for(lambda: not answer.asking, timeout=patience)
                self._refuse(answer)
                return False
            answer.asking = True
            return True

    def _refuse(self, answer: _Answer) -> None:
        lately = self._monotonic() - answer.refused < KEPT
        if answer.words is not None and (lately or answer.asking):
            raise Rejected(answer.words)

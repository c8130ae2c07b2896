"""What a row yields: a figure beside its bar, and what one system made of a load."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Cost", "Figure", "Run", "insist", "plain"]


@dataclass(frozen=True)
class Figure:
    """One measured number beside its bar."""

    what: str
    measured: float
    unit: str
    bar: float
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.measured >= self.bar if self.at_least else self.measured <= self.bar


@dataclass(frozen=True)
class Cost:
    """What processes took from the start of a load to its end."""

    cpu: float
    """Seconds, user and system; their own start is not in it."""

    rss: float
    """The highest sum of resident sizes seen, in MB: shared pages count for every process."""

    pss: float
    """The same in proportional sizes: a shared page counts once in all."""

    apart: str = ""
    """What other processes took that belong to it, in words."""


@dataclass
class Run:
    """What one system made of the load."""

    makespan: float
    """Seconds from just before the first call to the last end that it noticed."""

    lags: list[float]
    """Seconds from each end to when it was noticed."""

    calls: Mapping[str, int]
    """Calls of the provider's API, by kind."""

    cost: Cost
    remarks: list[str] = field(default_factory=list)

    @property
    def p95(self) -> float:
        """The lag from end to recorded that 95 % stay within, in seconds."""
        return statistics.quantiles(self.lags, n=20)[-1]

    @property
    def calls_per_chunk(self) -> float:
        """All calls, over the chunks."""
        return sum(self.calls.values()) / len(self.lags)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(self.calls.items()))
        cost = self.cost
        return (
            f"makespan {self.makespan:.1f} s, lag mean {statistics.mean(self.lags):.2f} p95 "
            f"{self.p95:.2f} s, calls/chunk {self.calls_per_chunk:.2f} ({kinds}), "
            f"CPU {cost.cpu:.1f} s, RSS {cost.rss:.0f} PSS {cost.pss:.0f} MB"
            + "".join(f"; {remark}" for remark in (cost.apart, *self.remarks) if remark)
        )


def plain(url: str) -> str:
    """Write a URL as psycopg takes it."""
    return url.replace("postgresql+psycopg:", "postgresql:", 1)


def insist(right: object, what: object) -> None:
    """Stop a measurement that measures nothing.

    Raises:
        RuntimeError: it is void.
    """
    if not right:
        raise RuntimeError(f"the measurement is void: {what}")

"""Amounts of memory and cpu as a job writes them: Kubernetes' quantities (vendor: Container)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Final

__all__ = ["DEFAULT_CPU", "DEFAULT_MEMORY", "amount"]

DEFAULT_CPU: Final = "1"
"""A container's cpus where the job does not say (vendor: configuring/services/cpu)."""

DEFAULT_MEMORY: Final = "512Mi"
"""A container's memory where the job does not say (vendor: configuring/memory-limits)."""

QUANTITY: Final = re.compile(r"(\d+(?:\.\d+)?)(m|k|[MGTPE]|[KMGTPE]i)?")
FACTORS: Final[Mapping[str, Decimal]] = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)},
}


def amount(text: str) -> Decimal:
    """Read a quantity: bytes for memory, cores for cpu.

    Raises:
        ValueError: it is none, or nothing.
    """
    found = QUANTITY.fullmatch(text)
    read = Decimal(found[1]) * FACTORS[found[2] or ""] if found else Decimal(0)
    if not read:
        raise ValueError(f"{text!r} is no amount such as 512Mi or 1")
    return read

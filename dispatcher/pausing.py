"""How long to leave a provider alone that does not answer. Pure: times are arguments."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pause"]


@dataclass(slots=True)
class Pause:
    """A pause that doubles with each failure, from two seconds on, until something succeeds."""

    longest: float
    """In seconds."""

    failures: int = 0
    until: float = 0.0
    """By the clock of whoever asks."""

    def lasts(self, now: float) -> bool:
        """Say if nothing may be asked yet."""
        return now < self.until

    def failed(self, now: float) -> None:
        """Pause, and the longer the longer nobody answers; those that fail together count once."""
        if not self.lasts(now):
            self.failures = min(self.failures + 1, 10)
            self.asked(now, 2.0**self.failures)

    def asked(self, now: float, seconds: float) -> None:
        """Pause for as long as the provider asked for."""
        self.until = now + min(self.longest, seconds)

    def answered(self) -> None:
        """Begin anew with the next failure."""
        self.failures = 0

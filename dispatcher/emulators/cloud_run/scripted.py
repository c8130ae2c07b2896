"""`ScriptRunner`: tasks that only pretend to run. Tens of thousands of them cost next to nothing.

The script is a function that is told of an attempt and says how long it takes and how it ends. The
world puts that end into its timetable; there is no process and no thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from dispatcher.emulators.cloud_run.tasks import Handle, Line, TaskEnd, TaskStart

__all__ = ["Script", "ScriptRunner", "succeed"]

Script = Callable[[TaskStart], TaskEnd | float | None]
"""Says how an attempt ends; a number is seconds until it succeeds, None means at once."""


def succeed(start: TaskStart) -> TaskEnd:  # noqa: ARG001 - the shape of a script
    """Succeed at once: the script for those who do not care."""
    return TaskEnd()


class ScriptRunner:
    """Ends each attempt as a script says.

    Args:
        script: called once for each attempt, with the world's lock held: it must not call the
            emulator, and must not wait.
        images: the images that exist; None if all do.
    """

    def __init__(self, script: Script = succeed, *, images: Collection[str] | None = None) -> None:
        self.script = script
        self.limit: int | None = None
        self._images = None if images is None else frozenset(images)

    def has_image(self, image: str) -> bool:
        """Whether the image is one of those given."""
        return self._images is None or image in self._images

    def start(
        self,
        start: TaskStart,
        wrote: Callable[[Line], None],  # noqa: ARG002 - its lines are in the end
        ended: Callable[[TaskEnd], None],  # noqa: ARG002 - the end is known
    ) -> TaskEnd | Handle:
        """Ask the script."""
        end = self.script(start)
        if end is None:
            return TaskEnd()
        return end if isinstance(end, TaskEnd) else TaskEnd(seconds=end)

    def close(self) -> None:
        """There is nothing that runs."""

"""Measures what the wall time of a process is spent on; `analysis.goodput` adds the times up."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Attributes all time since its creation to one activity at a time, at first to 'starting'.

    Attributes:
        began: Unix time of the creation.
    """

    def __init__(self):
        self.began = time.time()
        self._since, self._activity = time.perf_counter(), 'starting'
        self._spent: dict[str, float] = {}

    def enter(self, activity: str) -> None:
        """Ends the current activity and starts another, a name in `analysis.goodput.LABELS`."""
        now = time.perf_counter()
        self._add(self._activity, now - self._since)
        self._since, self._activity = now, activity

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Measures an activity inside of the current one."""
        outer = self._activity
        self.enter(activity)
        try:
            yield
        finally:
            self.enter(outer)

    def waited(self, seconds: float) -> None:
        """Attributes seconds of the steps to waiting for data."""
        self._add('waiting', seconds)
        self._add('steps', -seconds)

    def take(self) -> dict[str, float]:
        """Returns the seconds of each activity since the last call."""
        self.enter(self._activity)
        spent, self._spent = self._spent, {}
        return {name: round(seconds, 3) for name, seconds in spent.items()}

    def _add(self, activity: str, seconds: float) -> None:
        self._spent[activity] = self._spent.get(activity, 0.0) + seconds

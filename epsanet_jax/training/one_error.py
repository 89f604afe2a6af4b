"""One error, told once, where Orbax would print many."""

import logging
import sys
import warnings
from types import TracebackType
from typing import Any

from absl import logging as absl_logging

_LOGGERS = (absl_logging.get_absl_logger(), logging.getLogger('asyncio'))


class OneError:
    """Keeps what follows from the first error of reading or writing from being printed.

    Orbax treats all arrays at once in an event loop, which the first failure closes. The others then report
    to a closed loop, are found never to have begun, or have errors that nobody asked for, from other threads
    and for as long as the process lives; and each thread logs with a traceback what is raised in the end.
    """

    def __enter__(self) -> None:
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._without_closed_loops
        for logger in _LOGGERS:
            logger.addFilter(_not_of_orbax)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None:  # leaves both where they are
            warnings.filterwarnings('ignore', r"coroutine '.*' was never awaited", RuntimeWarning)
            return
        sys.unraisablehook = self._hook
        for logger in _LOGGERS:
            logger.removeFilter(_not_of_orbax)

    def _without_closed_loops(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != 'Event loop is closed':
            self._hook(unraisable)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    nobody_asked = record.name == 'asyncio' and 'exception was never retrieved' in record.getMessage()
    return not nobody_asked and '/orbax/' not in record.pathname

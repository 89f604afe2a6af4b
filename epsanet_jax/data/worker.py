"""What makes the worker processes that read pictures part of a run: its signals, its end and theirs."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from epsanet_jax.errors import TrainingError, one_line


class InWorkers:
    """Settles down in each worker process that it is sent to.

    A signal to the whole group, Ctrl-C say, is for the run to take, which still needs its pictures; and a
    worker whose run is gone, however it went, ends too.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if (
            multiprocessing.parent_process() is None
            or threading.current_thread() is not threading.main_thread()
        ):
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def until_killed(iterator: Iterator[Any]) -> Iterator[Any]:
    """Yields the batches; a worker that is gone is told in one line."""
    try:
        yield from iterator
    except RuntimeError as e:
        if 'terminated unexpectedly' not in str(e):
            raise
        raise TrainingError(
            f'a worker that reads pictures was killed, for want of memory perhaps: {one_line(e)}; set '
            'config.data.workers to fewer'
        ) from e

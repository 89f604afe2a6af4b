"""Worker processes that read images: they ignore signals meant for the run, and end when the run ends."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from epsanet_jax.data.decode import ignore_pillow_warnings
from epsanet_jax.errors import TrainingError, one_line


class InWorkers:
    """Prepares each worker process that an instance is sent to.

    The worker ignores SIGINT, SIGTERM and SIGHUP: Ctrl-C and a closed terminal reach the whole group of
    processes, but the run decides when to stop and needs images until then. The worker ends when the run
    ends, also if the run was killed.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if multiprocessing.parent_process() and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            end_with_parent()
            ignore_pillow_warnings()


@contextlib.contextmanager
def handling(number: int, handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Handles a signal with `handler` within the block.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. Other threads than the main one cannot
    handle signals.
    """
    ignored = signal.getsignal(number) == signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def end_with_parent() -> None:
    """Ends this worker process as soon as its parent process ends, also if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, 'not a worker process'
    threading.Thread(target=_end_with, args=[parent.sentinel, os.getppid()], daemon=True).start()


def _end_with(sentinel: int, parent: int) -> None:
    # A process that the parent forked may keep the sentinel's pipe open, so the parent's id is checked too.
    while not multiprocessing.connection.wait([sentinel], timeout=2) and os.getppid() == parent:
        pass
    os._exit(1)


def until_killed(iterator: Iterator[Any]) -> Iterator[Any]:
    """Yields the batches of worker processes.

    Raises:
        TrainingError: a worker was killed.
    """
    try:
        yield from iterator
    except RuntimeError as e:
        if 'terminated unexpectedly' not in str(e):
            raise
        why = 'was killed, perhaps because memory ran out: decrease config.data.workers'
        if f'exit code {-signal.SIGBUS}' in str(e):
            why = (
                'was ended by SIGBUS: batches do not fit in /dev/shm; enlarge it (docker run --shm-size=8g), '
                'decrease batch_size or set config.data.workers=0'
            )
        raise TrainingError(f'a worker process that reads images {why} ({one_line(e)})') from e

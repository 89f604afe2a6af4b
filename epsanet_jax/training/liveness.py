"""Heartbeats between the processes of a run, so that none waits forever for a lost one.

Each process writes to the run's key-value store every few seconds and reads what the others wrote.
"""

import atexit
import contextlib
import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # JAX has no public access to the key-value store

LOST = 30  # seconds without a heartbeat after which a process counts as lost
_BEAT = 5  # seconds between two heartbeats
before_end: list[Callable[[], None]] = []  # what `end_now` calls first
_ALIVE, _LEFT = 'epsanet_jax/alive', 'epsanet_jax/left'


class Watch:
    """Sends heartbeats, and ends this process when another one is lost or has left, until `stop`."""

    def __init__(self):
        self._own = f'{_ALIVE}/{jax.process_index()}'
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # runs before JAX disconnects, which ends the store

    def stop(self) -> None:
        """Ends the watch; the other processes no longer expect heartbeats."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # process 0, which keeps the store, is gone
            _store().key_value_delete(self._own)

    def _watch(self) -> None:
        seen: dict[str, tuple[str, float]] = {}  # last heartbeat of each process, and when it was new
        for beat in itertools.count():
            now = time.monotonic()
            try:
                _store().key_value_set(self._own, str(beat), allow_overwrite=True)
                beats, left = dict(_store().key_value_dir_get(_ALIVE)), _store().key_value_dir_get(_LEFT)
            except RuntimeError:
                if not self._stopped.is_set():
                    _end_lost('0')
                return
            for process, message in left:
                if _number(process) != jax.process_index():
                    status, _, message = message.partition(' ')
                    end_now(f'process {_number(process)}: {message}', int(status))
            seen = {
                process: seen[process] if seen.get(process, ('', 0.0))[0] == last else (last, now)
                for process, last in beats.items()
            }
            lost = sorted(_number(process) for process, (_, when) in seen.items() if now - when > LOST)
            if lost:
                _end_lost(', '.join(map(str, lost)))
            if self._stopped.wait(_BEAT):
                return


def of_first_process(key: str, own: str, timeout: float = 60) -> str:
    """Returns the text that process 0 gives for a key; other processes wait for it."""
    if jax_distributed.global_state.process_id == 0:
        _store().key_value_set(key, own, allow_overwrite=True)
        return own
    try:
        return _store().blocking_key_value_get(key, round(1000 * timeout))
    except RuntimeError:
        return 'an older version'


def leave_first(message: str, status: int) -> None:
    """Reports to the other processes that this one ends, and why; they end with the same status.

    Process 0, which keeps the store, returns only after the others had time to read it.
    """
    if not jax.distributed.is_initialized():
        return
    try:
        _store().key_value_set(f'{_LEFT}/{jax.process_index()}', f'{status} {message}', allow_overwrite=True)
    except RuntimeError:
        return  # process 0 is gone
    if jax.process_index() == 0:
        time.sleep(_BEAT + 1)


def _store() -> Any:
    return jax_distributed.global_state.client


def _number(key: str) -> int:
    return int(key.rpartition('/')[2])


def _end_lost(processes: str) -> NoReturn:
    end_now(f'error: process {processes} of this run failed or was lost; start all processes again', 1)


def end_now(message: str, status: int) -> NoReturn:
    """Prints a line on stderr and ends this process and its workers at once."""
    print(message, file=sys.stderr, flush=True)
    for call in list(before_end):
        call()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)

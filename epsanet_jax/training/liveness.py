"""Signs of life between the processes of a run, so that none waits without end for one that is gone.

Each process writes into the run's key-value store every few seconds, and reads what the others wrote.
"""

import atexit
import contextlib
import itertools
import multiprocessing
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # the only way to the key-value store of the run

LOST = 30  # seconds of silence after which a process counts as lost
_BEAT = 5  # seconds between two signs
_ALIVE, _LEFT = 'epsanet_jax/alive', 'epsanet_jax/left'


class Watch:
    """Leaves signs of life and ends this process when another one is lost or has left; until `stop`."""

    def __init__(self):
        self._own = f'{_ALIVE}/{jax.process_index()}'
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # before JAX takes its leave of the others, which ends the store

    def stop(self) -> None:
        """Ends the watch; the others no longer expect signs."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # process 0 is gone, and with it those who would read
            _store().key_value_delete(self._own)

    def _watch(self) -> None:
        seen: dict[str, tuple[str, float]] = {}  # by process: its last sign, and when it was new
        for beat in itertools.count():
            now = time.monotonic()
            try:
                _store().key_value_set(self._own, str(beat), allow_overwrite=True)
                signs, left = dict(_store().key_value_dir_get(_ALIVE)), _store().key_value_dir_get(_LEFT)
            except RuntimeError:
                if not self._stopped.is_set():
                    end_now('error: process 0 of this run failed or was lost; start all processes again', 1)
                return
            for process, message in left:
                if _number(process) != jax.process_index():
                    status, _, message = message.partition(' ')
                    end_now(f'process {_number(process)}: {message}', int(status))
            seen = {
                process: seen[process] if seen.get(process, ('', 0.0))[0] == sign else (sign, now)
                for process, sign in signs.items()
            }
            lost = sorted(_number(process) for process, (_, when) in seen.items() if now - when > LOST)
            if lost:
                numbers = ', '.join(map(str, lost))
                end_now(
                    f'error: process {numbers} of this run failed or was lost; start all processes again', 1
                )
            if self._stopped.wait(_BEAT):
                return


def leave_first(message: str, status: int) -> None:
    """Tells the other processes that this one ends before they do, and why: they end with the same status.

    Returns when they had the time to hear of it: process 0 takes the store with it.
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


def end_now(message: str, status: int) -> NoReturn:
    """Prints a line and ends this process and its workers at once, waiting for nobody."""
    print(message, file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)

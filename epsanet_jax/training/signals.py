"""SIGTERM, SIGINT and SIGHUP as a request to stop after the current step."""

import os
import signal
import sys
import threading
from typing import NoReturn, Self

from epsanet_jax.errors import INTERRUPTED
from epsanet_jax.training import liveness

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """Context that records SIGTERM, SIGINT and SIGHUP; a second SIGINT ends the process at once.

    A thread receives the signals, because Python's own handlers wait while the main thread compiles. If
    nothing is unsaved, the thread ends the process with status 75. Signals can be caught only in the main
    thread; in other threads this context does nothing. SIGHUP, sent when a terminal is closed, stays ignored
    if it is ignored already, for example by nohup.

    Attributes:
        requested: whether the run should stop.
        unsaved: whether the process has made steps that would be lost; set by the run.
    """

    def __init__(self):
        self.requested = self.unsaved = False
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python writes the signal's number to the pipe at once, even while the main thread compiles.
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        caught = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._handlers = {s: signal.signal(s, lambda *_: None) for s in caught}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._handlers = {}
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, b'\0')
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number not in _SIGNALS:
                continue
            name = signal.Signals(number).name
            if not self.unsaved:
                _end(f'{name}: stopped, nothing was unsaved; the same command continues')
            if self.requested and number == signal.SIGINT:
                _end(f'{name} again: stopped, not saved; the same command continues at the last checkpoint')
            if not self.requested:
                print(f'{name}: saving after the current step ...', file=sys.stderr, flush=True)
            self.requested = True


def _end(message: str) -> NoReturn:
    liveness.leave_first(message, INTERRUPTED)
    liveness.end_now(message, INTERRUPTED)

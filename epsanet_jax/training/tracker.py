"""Sends the lines of metrics.jsonl and the configuration to Weights & Biases or to Trackio."""

import contextlib
import importlib.util
import json
import os
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from epsanet_jax.errors import InputError
from epsanet_jax.paths import is_remote, replacing
from epsanet_jax.workdir import TRACKER_FILE

KINDS = ('wandb', 'trackio')
_PATIENCE = 60.0  # seconds in which a tracker must finish


def check_installed(kind: str) -> None:
    """Raises InputError if the package of a tracker ('' for none) is missing."""
    if kind and importlib.util.find_spec(kind) is None:
        install = f"pip install '.[{kind}]'"
        raise InputError(f'config.tracker={kind} needs the package {kind}: {install}')


class Tracker:
    """A run of a tracker, in a process of its own: what fails or hangs there does not stop the training.

    The tracker's id of the run is kept in the workdir: a continued run is the same run of the tracker. All
    lines so far are sent again, because a killed process may have lost some; trackers ignore what they have.
    A failure is one warning.

    Args:
        kind: a name in `KINDS`.
        project: name of the project there.
        workdir: folder of the run; its name is the name of the run there.
        config: the configuration.
        lines: lines of metrics.jsonl so far.
        report: called with a line, possibly in another thread.

    Raises:
        InputError: the id cannot be read or written.
    """

    def __init__(
        self,
        kind: str,
        project: str,
        workdir: epath.Path,
        config: dict[str, Any],
        lines: Sequence[dict[str, Any]],
        report: Callable[[str], None],
    ):
        self._kind, self._report, self._failed = kind, report, False
        settings = {
            'kind': kind,
            'project': project,
            'name': workdir.name,
            'id': _id_of(workdir, kind),
            'config': config,
            'dir': None if is_remote(workdir) else str(workdir),
            'pid': os.getpid(),
        }
        script = Path(__file__).with_name('tracker_process.py')
        self._process = subprocess.Popen(
            [sys.executable, '-P', str(script)],  # -P: the modules beside the script are not its imports
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C ends it by the end of its input
        )
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        for line in (settings, *lines):
            self._queue.put(line)
        threads = [threading.Thread(target=t, daemon=True) for t in (self._send, self._receive)]
        for thread in threads:
            thread.start()
        self._receiver = threads[1]

    def write(self, line: dict[str, Any]) -> None:
        """Sends a line, without waiting."""
        if not self._failed:
            self._queue.put(line)

    def close(self) -> None:
        """Waits until everything is sent, at most a minute."""
        self._queue.put(None)
        try:
            self._process.wait(0 if self._failed else _PATIENCE)
        except subprocess.TimeoutExpired:
            self._fail(f'not finished after {_PATIENCE:.0f} s')
            self._process.kill()
            self._process.wait()
        self._receiver.join(1.0)

    def _send(self) -> None:
        pipe: Any = self._process.stdin
        with contextlib.suppress(OSError):  # the process has ended; the other thread reports why
            while (line := self._queue.get()) is not None:
                pipe.write(json.dumps(line) + '\n')
                pipe.flush()
        with contextlib.suppress(OSError):
            pipe.close()

    def _receive(self) -> None:
        pipe: Any = self._process.stdout
        for text in pipe:
            if text.startswith('error: '):
                self._fail(text[7:].strip())
            else:
                self._report(f'{self._kind}: {text.strip()}')
        pipe.close()
        if status := self._process.wait():
            self._fail(f'its process ended with status {status}')

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._report(f'warning: {self._kind} failed: {reason}; the run goes on without it')


def _id_of(workdir: epath.Path, kind: str) -> str:
    """Returns the tracker's id of the run, which is new at the first call."""
    path = workdir / TRACKER_FILE
    try:
        ids = json.loads(path.read_text()) if path.exists() else {}
        if kind not in ids:
            ids[kind] = secrets.token_hex(4)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(ids) + '\n')
        return str(ids[kind])
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f'cannot use {path}: {e}; remove it to start a new run of {kind}') from e

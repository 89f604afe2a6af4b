"""The lock of a workdir: one trainer at a time.

The lock is a file that names its owner and that a thread of the owner changes every `BEAT` seconds. It needs
no locks of the file system, which network file systems and buckets may lack.
"""

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import jax
from etils import epath

from epsanet_jax.errors import InputError
from epsanet_jax.paths import is_remote, replacing
from epsanet_jax.training import liveness
from epsanet_jax.workdir import LOCK_FILE

BEAT = 10  # seconds between two changes of the file
STALE = 60  # seconds without a change after which an owner on another machine counts as gone


class Lock:
    """Context in which process 0 holds the lock of a workdir.

    If the owner of a lock has ended without releasing it, the lock is taken over: at once if the owner ran on
    this machine, otherwise if the file does not change for `STALE` seconds. Clocks are not compared.

    Args:
        workdir: folder of the run; it is created.
        log: called with a line if a lock is taken over, or must be watched first.

    Raises:
        InputError: another trainer holds the lock, or the workdir cannot be written to.
    """

    def __init__(self, workdir: epath.Path, log: Callable[[str], None]):
        self._path, self._log = workdir / LOCK_FILE, log
        now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
        self._own = {**_this_process(), 'since': now, 'id': secrets.token_hex(8), 'beat': 0}
        self._lost_to = ''
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        if jax.process_index() != 0:
            return self
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                owner = self._read()
                if owner is not None and self._is_own(owner):
                    break
                if owner is not None:
                    self._take_over(owner)
        except OSError as e:
            raise InputError(f'cannot write to --workdir={self._path.parent}: {e.strerror or e}') from e
        self._thread.start()
        liveness.before_end.append(self.release)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Raises InputError if another trainer has taken over the lock, perhaps while this one was halted."""
        if self._lost_to:
            raise InputError(f'{self._lost_to} has taken over {self._path.parent}: this run ends')

    def release(self) -> None:
        """Removes the file, if this process holds the lock."""
        if self.release not in liveness.before_end:
            return
        liveness.before_end.remove(self.release)
        self._stopped.set()
        self._thread.join(BEAT)
        with contextlib.suppress(OSError):
            if self._is_own(self._read() or {}):
                self._path.unlink()

    def _create(self) -> bool:
        """Creates the file, or returns False if it exists."""
        if is_remote(self._path):  # not in one step: if two trainers do this, the heartbeat notices it
            if self._path.exists():
                return False
            self._path.write_text(json.dumps(self._own))
            return True
        try:
            with open(self._path, 'x') as f:
                try:
                    f.write(json.dumps(self._own))
                    f.flush()
                except OSError:
                    self._path.unlink()
                    raise
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        """Returns the content of the file; {} if it is damaged, None if there is none."""
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self) -> None:
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps(self._own))

    def _is_own(self, owner: dict[str, Any]) -> bool:
        return owner.get('id') == self._own['id']

    def _take_over(self, owner: dict[str, Any]) -> None:
        """Replaces the lock of an owner that has ended."""
        workdir, ended = self._path.parent, _has_ended(owner)
        if ended is None:
            self._log(f'{workdir} is locked by {_describe(owner)}; waiting {STALE} s for its heartbeat')
            until, ended = time.monotonic() + STALE, True
            while ended and time.monotonic() < until:
                time.sleep(min(1, STALE / 10))
                ended = self._read() == owner
        if self._read() is None:  # released
            return
        if not ended:
            raise InputError(f'{workdir} is in use by {_describe(owner)}; wait for its end, or stop it first')
        self._log(f'warning: the lock of {workdir} is taken over from {_describe(owner)}, which has ended')
        self._write()
        time.sleep(0.2)  # of several processes that do this at the same time, the last one gets the lock

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            with contextlib.suppress(OSError):  # the run ends if checkpoints or metrics cannot be written
                owner = self._read()
                if owner and not self._is_own(owner):
                    self._lost_to = _describe(owner)
                    return
                if owner is None:
                    self._create()
                else:
                    self._own['beat'] += 1
                    self._write()


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {'host': socket.gethostname(), 'machine': _machine(), 'pid': pid, 'started': _started(pid)}


def _machine() -> str:
    """Returns where ids of processes are valid: this boot of this machine, and a container's namespace."""
    try:
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return f'{boot} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return ''


def _started(pid: int) -> str:
    """Returns when a process of this machine started, in ticks since the boot; '' if it does not run."""
    try:
        fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return ''
    return '' if fields[0] in 'ZX' else fields[19]  # ended, but its parent has not asked for its status


def _has_ended(owner: dict[str, Any]) -> bool | None:
    """Whether an owner has ended; None if that cannot be known here."""
    pid = owner.get('pid')
    if not isinstance(pid, int) or not owner.get('machine') or owner['machine'] != _machine():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # of another user, whose processes may be hidden
        return None
    return _started(pid) != owner.get('started')


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return 'another trainer'
    return 'process {} on {} (since {})'.format(*(owner.get(k, '?') for k in ('pid', 'host', 'since')))

"""Several processes as one run: joins them and checks that they agree. All waits have a time limit."""

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import select
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from epsanet_jax.errors import InputError, TrainingError, one_line
from epsanet_jax.platform import check_platform
from epsanet_jax.training import liveness
from epsanet_jax.version import __version__

_ALL_THERE = 'all there'
TIMEOUT = 300  # seconds within which all processes must join


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int = TIMEOUT
) -> None:
    """Joins the processes of a run; call it before anything uses a device.

    Without arguments JAX detects the cluster (Cloud TPU, SLURM, Open MPI, Kubernetes); without a cluster this
    process is the only one.

    Args:
        coordinator: host:port at which the other processes reach process 0.
        num_processes: number of processes.
        process_id: number of this process, from 0.
        timeout: seconds to wait for the others; the process ends if they have not joined by then.

    Raises:
        InputError: some of the arguments are missing or out of range.
        TrainingError: the processes cannot be joined.
    """
    explicit = any(value is not None for value in (coordinator, num_processes, process_id))
    if explicit:
        _check(coordinator, num_processes, process_id)
        if num_processes == 1:
            return
        wanted = f'{num_processes} processes at {coordinator}, this is {process_id}'
        print(f'waiting up to {timeout} s for {wanted}', file=sys.stderr, flush=True)
    # The run handles signals itself (training.signals); JAX would catch SIGTERM.
    jax.config.update('jax_enable_preemption_service', False)
    # JAX itself, with a timeout 10 seconds later, would end the process with a stack trace.
    message = f'error: not all processes joined within {timeout} s; start all processes again'
    late = threading.Timer(timeout, liveness.end_now, [message, 1])
    late.daemon = True
    late.start()
    try:
        if explicit:
            _meet(coordinator, num_processes, process_id)  # pyright: ignore[reportArgumentType]
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method='deactivate' if explicit else None,
            initialization_timeout=timeout + 10,
        )
    except InputError:
        raise
    except ValueError as e:
        if not explicit and 'coordinator_address should be defined' in str(e):
            return  # no cluster
        raise InputError(f'cannot join the processes of this run: {one_line(e)}') from e
    except KeyError as e:
        raise InputError(
            f'the environment names a cluster, but {e} is not set: start with the launcher of the cluster, '
            'or unset its variables'
        ) from e
    except RuntimeError as e:
        raise TrainingError(f'the processes of this run cannot be joined: {one_line(e)}') from e
    finally:
        late.cancel()
    _check_code()
    check_platform()
    if jax.process_count() > 1:
        liveness.Watch()


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is None or num_processes is None or process_id is None:
        given = {'--coordinator': coordinator, '--num_processes': num_processes, '--process_id': process_id}
        missing = next(name for name, value in given.items() if value is None)
        raise InputError(f'--coordinator, --num_processes and --process_id are needed: {missing} is missing')
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal():
        raise InputError(f'--coordinator={coordinator} must be HOST:PORT')
    if not 0 < int(port) < 2**16:
        raise InputError(f'--coordinator={coordinator}: the port must be from 1 to {2**16 - 1}')
    if not 0 <= process_id < num_processes:
        raise InputError(f'--process_id={process_id} must be at least 0 and below {num_processes}')


def _meet(coordinator: str, num_processes: int, process_id: int) -> None:
    """Waits until all processes are there, each with another number; JAX would abort at two equal ones.

    Process 0 listens at the port of the coordinator, where JAX listens after this.
    """
    host, _, port = coordinator.rpartition(':')
    if process_id == 0:
        _meet_others(coordinator, int(port), num_processes)
        return
    while True:
        with (
            contextlib.suppress(OSError),  # process 0 does not listen yet
            socket.create_connection((host.strip('[]'), int(port)), timeout=10) as connection,
        ):
            connection.settimeout(None)
            connection.sendall(f'{process_id}\n'.encode())
            answer = connection.makefile().readline().strip()
            if answer == _ALL_THERE:
                return
            if answer:
                raise InputError(answer)
        time.sleep(0.5)


def _meet_others(coordinator: str, port: int, num_processes: int) -> None:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with contextlib.ExitStack() as opened:
        try:
            server = socket.create_server(('', port), family=family, dualstack_ipv6=family == socket.AF_INET6)
        except OSError as e:  # JAX would crash
            reason = os.strerror(e.errno or 0)
            raise InputError(f'--coordinator={coordinator}: cannot use port {port} here: {reason}') from e
        opened.enter_context(server)
        there: dict[int, socket.socket] = {}
        connections, answer = [], _ALL_THERE
        while answer == _ALL_THERE and len(there) < num_processes - 1:
            connections.append(connection := opened.enter_context(server.accept()[0]))
            connection.settimeout(10)
            try:
                number = int(connection.makefile().readline())
            except (OSError, ValueError):  # of another program
                continue
            if number in there and not select.select([there[number]], [], [], 0)[0]:  # not closed
                answer = f'two processes have --process_id={number}: give each another number'
            there[number] = connection
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(f'{answer}\n'.encode())
    if answer != _ALL_THERE:
        raise InputError(answer)


def _check_code() -> None:
    """Raises InputError unless process 0 runs the same code; collectives of different code hang or fail."""
    files = sorted(pathlib.Path(__file__).parents[1].rglob('*.py'))
    source = hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:8]
    own = f'epsanet_jax {__version__} (source {source}) with JAX {jax.__version__}'
    first = liveness.of_first_process('epsanet_jax/code', own)
    if first != own:
        raise InputError(f'this process runs {own}, process 0 runs {first}: install the same code everywhere')


def check_agreement(facts: dict[str, Any]) -> None:
    """Raises InputError if the processes have different facts; the values must be valid in JSON."""
    if jax.process_count() == 1:
        return
    digests = [
        hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in facts.values()
    ]
    own = np.frombuffer(b''.join(digests), np.uint8).reshape(len(facts), -1)
    everyone = multihost_utils.process_allgather(own)  # [P, facts, 32]
    for process, other in enumerate(everyone):
        equal = (other == everyone[0]).all(axis=-1)
        differing = ', '.join(name for name, same in zip(facts, equal, strict=True) if not same)
        if differing:
            raise InputError(
                f'processes 0 and {process} differ in {differing}: give all the same recipe, options and data'
            )


def check_shared(workdir: epath.Path, timeout: float = 20) -> None:
    """Raises InputError unless all processes see the files that process 0 writes into a folder."""
    if jax.process_count() == 1:
        return
    token = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    probe = workdir / f'.seen-by-all-{token}'
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.touch()
    barrier('probe')
    until = time.monotonic() + timeout  # network file systems show new files with a delay
    while not probe.exists() and time.monotonic() < until:
        time.sleep(0.5)
    seen = multihost_utils.process_allgather(np.asarray(probe.exists()))
    if jax.process_index() == 0:
        probe.unlink()
    if not seen.all():
        raise InputError(
            f'process {int(np.argmin(seen))} does not see --workdir={workdir} of process 0: use a bucket '
            '(gs://BUCKET/RUN) or a network file system'
        )


def all_agree(ok: bool) -> bool:
    """Returns whether `ok` is true in every process."""
    return ok if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave(message: str, status: int) -> NoReturn:
    """Ends this process with a line on stderr, and the others too, which would wait for it."""
    sys.stdout.flush()
    liveness.leave_first(message, status)
    # After a failed write, threads of Orbax keep a process that ends normally for minutes.
    if jax.distributed.is_initialized() or status == 1:
        liveness.end_now(message, status)
    print(message, file=sys.stderr)
    sys.exit(status)

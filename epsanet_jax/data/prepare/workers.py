"""Shards written by several processes, which end with this one.

Not a ProcessPoolExecutor: workers share locks there, and one that is killed may leave all waiting.
"""

import functools
import multiprocessing
import multiprocessing.connection
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from epsanet_jax.data.prepare.shards import Shard, Written, write_shard
from epsanet_jax.data.worker import end_with_parent
from epsanet_jax.errors import InputError

_SECONDS = 0.3  # between looks at how far they are


def write_shards(
    shards: Sequence[Shard],
    folder: str,
    on_bad: str,
    num_classes: int,
    workers: int,
    done: Callable[[int], None],
) -> Generator[tuple[Shard, Written]]:
    """Writes shards and yields each as it is finished, in no order.

    After one with pictures that stop it no other is begun; those that have begun are finished.

    Args:
        shards: to write.
        folder: of the data set.
        on_bad: 'stop' or 'skip'.
        num_classes: of the data set.
        workers: number of processes; 1: this one.
        done: called now and then with the number of pictures that have been dealt with.

    Raises:
        InputError: a file cannot be written, or a worker was killed.
    """
    write = functools.partial(write_shard, folder=folder, on_bad=on_bad, num_classes=num_classes)
    if workers == 1 or len(shards) <= 1:
        yield from _write_here(shards, write, done)
    else:
        yield from _write_in_processes(shards, write, workers, done)


def _write_here(
    shards: Sequence[Shard], write: Callable[..., Written], done: Callable[[int], None]
) -> Generator[tuple[Shard, Written]]:
    pictures = 0

    def tick() -> None:
        nonlocal pictures
        pictures += 1
        done(pictures)

    for shard in shards:
        written = write(shard, tick=tick)
        yield shard, written
        if not written.sha256:
            return


def _write_in_processes(
    shards: Sequence[Shard], write: Callable[..., Written], workers: int, done: Callable[[int], None]
) -> Generator[tuple[Shard, Written]]:
    context = multiprocessing.get_context('spawn')
    shared = context.RawArray('q', len(shards))  # pictures done of each
    crew: dict[Any, SpawnProcess] = {}
    waiting = list(enumerate(shards))[::-1]
    busy: dict[Any, Shard] = {}
    try:
        with _interrupts_ignored():  # by the workers, from their first moment on
            for _ in range(min(workers, len(shards))):
                ours, theirs = context.Pipe()
                crew[ours] = context.Process(target=_work, args=(theirs, shared, write), daemon=True)
                crew[ours].start()
                theirs.close()  # so that the worker's end is the end of the pipe
        ready: list[Any] = list(crew)
        while busy or ready:
            for connection in ready:
                if waiting:
                    connection.send(waiting[-1])
                    busy[connection] = waiting.pop()[1]
            ready = multiprocessing.connection.wait(busy, _SECONDS) if busy else []
            done(sum(shared))
            for connection in ready:
                shard, answer = busy.pop(connection), connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                if not answer.sha256:
                    waiting.clear()
                yield shard, answer
    except (EOFError, ConnectionError) as e:
        raise InputError(
            'a worker process was killed, for lack of memory perhaps: try fewer --workers; '
            'the same command continues'
        ) from e
    finally:
        for connection, process in crew.items():
            connection.close()
            process.terminate()
        for process in crew.values():
            process.join()
            process.close()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, shared: Any, write: Callable[..., Written]) -> None:
    """Writes the shards that come through the pipe, until it is closed; answers with what became of each."""
    end_with_parent()
    while True:
        try:
            slot, shard = connection.recv()
        except (EOFError, ConnectionError):
            return

        def tick(slot: int = slot) -> None:
            shared[slot] += 1

        try:
            answer = write(shard, tick=tick)
        except Exception as e:
            if not isinstance(e, InputError):
                e.add_note(traceback.format_exc())
            answer = e
        with suppress(ConnectionError):  # this one is to be ended
            connection.send(answer)

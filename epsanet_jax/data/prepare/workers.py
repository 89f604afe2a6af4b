"""Writes shards in several processes, which end with this one.

ProcessPoolExecutor is not used because its workers share locks: a killed worker could block all others.
"""

import functools
import itertools
import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from epsanet_jax.data.decode import ignore_pillow_warnings
from epsanet_jax.data.prepare.shards import Shard, Written, write_shard
from epsanet_jax.data.worker import end_with_parent, handling
from epsanet_jax.errors import InputError

_SECONDS = 0.3  # between updates of the progress
Results = Generator[tuple[Shard, Written]]


def write_shards(
    shards: Sequence[Shard],
    folder: str,
    on_bad: str,
    num_classes: int,
    workers: int,
    done: Callable[[int], object],
) -> Results:
    """Writes shards, and yields each shard with its result when it is finished, in any order.

    After a shard that bad images stopped, it starts no other shard, and finishes those in progress.

    Args:
        shards: shards to write.
        folder: path of the dataset.
        on_bad: see `shards.write_shard`.
        num_classes: see `shards.write_shard`.
        workers: number of processes; 1: write in this process.
        done: called repeatedly with the number of processed images.

    Raises:
        InputError: a file cannot be written, or a worker was killed.
    """
    write = functools.partial(write_shard, folder=folder, on_bad=on_bad, num_classes=num_classes)
    if workers > 1 and len(shards) > 1:
        yield from _write_in_processes(shards, write, workers, done)
        return
    images = itertools.count(1)
    for shard in shards:
        written = write(shard, tick=lambda: done(next(images)))
        yield shard, written
        if not written.sha256:
            return


def _write_in_processes(
    shards: Sequence[Shard], write: Callable[..., Written], workers: int, done: Callable[[int], object]
) -> Results:
    context = multiprocessing.get_context('spawn')
    shared = context.RawArray('q', len(shards))  # images processed per shard
    crew: dict[Any, SpawnProcess] = {}
    waiting = list(enumerate(shards))[::-1]
    busy: dict[Any, Shard] = {}
    try:
        with handling(signal.SIGINT, signal.SIG_IGN), handling(signal.SIGHUP, signal.SIG_IGN):  # inherited
            for _ in range(min(workers, len(shards))):
                ours, theirs = context.Pipe()
                crew[ours] = context.Process(target=_work, args=(theirs, shared, write), daemon=True)
                crew[ours].start()
                theirs.close()  # so that the pipe ends when the worker ends
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
            'a worker process was killed, perhaps because memory ran out: decrease --workers and run the '
            'same command again; it continues'
        ) from e
    finally:
        for connection, process in crew.items():
            connection.close()
            process.terminate()
        for process in crew.values():
            process.join()
            process.close()


def _work(connection: Connection, shared: Any, write: Callable[..., Written]) -> None:
    """Writes the shards received through the pipe until it is closed, and sends each result back."""
    end_with_parent()
    ignore_pillow_warnings()
    with suppress(EOFError, ConnectionError):  # the main process is ending
        while True:
            slot, shard = connection.recv()

            def tick(slot: int = slot) -> None:
                shared[slot] += 1

            try:
                answer = write(shard, tick=tick)
            except Exception as e:
                if not isinstance(e, InputError):
                    e.add_note(traceback.format_exc())
                answer = e
            connection.send(answer)

"""Worker processes: signals, a killed worker, and the end of the run."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from epsanet_jax.data.pipeline import Reading, Rows, train_batches
from epsanet_jax.data.sources import Synthetic
from epsanet_jax.data.transforms import RandomCrop, TrainTransform
from epsanet_jax.data.worker import until_killed
from epsanet_jax.errors import TrainingError

SOURCE, TRANSFORM = Synthetic(20, 4, 32), TrainTransform(RandomCrop(32))


class Slow(Synthetic):
    def __getitem__(self, index):
        time.sleep(0.05)
        return super().__getitem__(index)


def batches_of(source, workers):
    return train_batches(source, TRANSFORM, Rows(6), seed=5, reading=Reading(workers=workers))


def test_killed_worker_is_an_error():
    batches = batches_of(Slow(20, 4, 32), workers=1)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(TrainingError, match=r'was killed.*: decrease config\.data\.workers'):
        list(itertools.islice(batches, 200))


@pytest.mark.parametrize(
    ('code', 'advice'),
    [
        (-signal.SIGBUS, '/dev/shm; enlarge it (docker run --shm-size=8g)'),
        (-signal.SIGKILL, 'memory ran out: decrease config.data.workers'),
    ],
)
def test_the_message_names_what_a_worker_lacked(code, advice):
    def batches():
        raise RuntimeError(
            f'Worker process was terminated unexpectedly with exit code {code}. Search the logs'
        )
        yield

    with pytest.raises(TrainingError, match=re.escape(advice)):
        list(until_killed(batches()))


@pytest.mark.parametrize(
    'number',
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))],
)
def test_workers_ignore_signals_meant_for_the_run(number):
    batches, expected = batches_of(SOURCE, workers=1), batches_of(SOURCE, workers=0)
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid, number)
    next(expected)
    for _ in range(60):
        np.testing.assert_array_equal(next(batches)['image'], next(expected)['image'])
    batches.close()
    expected.close()


# Each starts a worker, prints its process id and ends without ending the worker.
OF_PIPELINE = """
import multiprocessing, os
from test_worker import SOURCE, batches_of
if __name__ == '__main__':
    batches = batches_of(SOURCE, workers=1)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os._exit(1)
"""
OF_PREPARE = """
import multiprocessing, os
from epsanet_jax.data.prepare import workers
if __name__ == '__main__':
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(target=workers._work, args=(theirs, None, None))
    process.start()
    ours.send((0, None))
    ours.recv()
    print(process.pid, flush=True)
    os._exit(1)
"""
# A forked process holds the sentinel's pipe open.
WITH_A_FORK = """
import multiprocessing, os, time
from epsanet_jax.data.worker import end_with_parent
def work(connection):
    end_with_parent()
    connection.send(0)
    time.sleep(600)
if __name__ == '__main__':
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=[theirs])
    process.start()
    ours.recv()
    forked = os.fork()
    if not forked:
        time.sleep(600)
        os._exit(0)
    print(process.pid, flush=True)
    print(forked, flush=True)
    os._exit(1)
"""


@pytest.mark.parametrize(
    'script', [OF_PIPELINE, OF_PREPARE, WITH_A_FORK], ids=['pipeline', 'prepare', 'fork']
)
def test_workers_end_when_the_run_has_ended(tmp_path, script):
    (tmp_path / 'run.py').write_text(script)
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    run = subprocess.Popen(
        [sys.executable, tmp_path / 'run.py'],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    workers = [int(pid) for pid in run.stdout.readline().split()]
    run.wait(timeout=120)
    assert workers
    until = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    ended = not any(map(is_running, workers))
    if script == WITH_A_FORK:
        os.kill(int(run.stdout.readline()), signal.SIGKILL)
    run.stdout.close()
    assert ended


def is_running(pid):
    """Whether a process is there and has not ended."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rpartition(')')[2].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False

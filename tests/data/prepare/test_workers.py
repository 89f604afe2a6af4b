"""Shards written in several processes."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from epsanet_jax import InputError
from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.prepare import dataset, workers
from epsanet_jax.data.prepare.shards import write_shard
from epsanet_jax.errors import Interrupted

from .helpers import SHARD, records


def test_several_processes_write_the_same_files(images, tmp_path):
    for n in (1, 2):
        dataset.prepare(str(images), str(tmp_path / f'{n}'), num_workers=n, shard_bytes=SHARD)
    files = sorted(p.name for p in (tmp_path / '1').iterdir())
    assert sum('train.array_record' in name for name in files) == 4
    assert sorted(p.name for p in (tmp_path / '2').iterdir()) == files
    for name in files:
        assert (tmp_path / '1' / name).read_bytes() == (tmp_path / '2' / name).read_bytes()
    folder = ImageFolder(images / 'train')
    assert [r[2] for r in records(tmp_path / '2', 'train')] == [folder[i]['image'] for i in range(7)]


def test_killed_worker_is_an_error(images, tmp_path):
    def kill_one():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(InputError, match='a worker process was killed'):
        dataset.prepare(str(images), str(tmp_path / 'out'), num_workers=2, shard_bytes=SHARD)
    killer.join(timeout=10)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_interrupt_and_the_same_call_continues(images, tmp_path, monkeypatch, number):
    def write(*arguments, **options):
        os.kill(os.getpid(), number)
        return write_shard(*arguments, **options)

    monkeypatch.setattr(workers, 'write_shard', write)
    # The test itself may run under nohup, where signals are ignored.
    not_ignored = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, not_ignored)
    try:
        with pytest.raises(Interrupted, match='interrupted; the same command continues'):
            dataset.prepare(str(images), str(tmp_path / 'out'), num_workers=1)
        signal.signal(number, signal.SIG_IGN)
        prepared = dataset.prepare(str(images), str(tmp_path / 'out'), num_workers=1)
    finally:
        signal.signal(number, before)
    assert prepared.splits['train'].kept == 7

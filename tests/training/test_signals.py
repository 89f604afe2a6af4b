"""SIGTERM, SIGINT and SIGHUP: the run saves, stops and can continue."""

import os
import signal
import subprocess
import sys

import pytest
from runs import (
    ROOT,
    assert_equal_runs,
    finish,
    lines,
    recipe,
    saved_steps,
    signal_at,
    start,
    wait_for,
)

from epsanet_jax.errors import Interrupted
from epsanet_jax.training import loop


@pytest.mark.parametrize(
    'number',
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_makes_the_run_save_and_it_continues_bit_for_bit(
    uninterrupted_8, tmp_path, monkeypatch, capsys, number
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, 'train_batches', 2, number)
        with pytest.raises(Interrupted, match=r'stopped at step \d'):
            loop.train(recipe(steps=8), str(tmp_path))
    assert signal.getsignal(number) is before
    assert number.name in capsys.readouterr().err
    assert 2 < max(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) < 8
    loop.train(recipe(steps=8), str(tmp_path))
    assert_equal_runs(tmp_path, uninterrupted_8, 8)


@pytest.mark.slow
def test_an_interrupted_evaluation_is_repeated(uninterrupted_8, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 'eval_batches', 3)
        with pytest.raises(Interrupted, match='stopped at step 2'):
            loop.train(recipe(steps=8), str(tmp_path))
    assert [(x['split'], x['step']) for x in lines(tmp_path)] == [('train', 2)]
    loop.train(recipe(steps=8), str(tmp_path))
    assert_equal_runs(tmp_path, uninterrupted_8, 8)


def test_during_compilation_a_signal_ends_the_process_at_once(tiny, tmp_path):
    # Without the cache, compilation takes long enough on any machine.
    settings = {'JAX_ENABLE_COMPILATION_CACHE': '0'}
    process = start(tiny, tmp_path / 'run', settings=settings)
    wait_for(process, 'compiling ...')
    process.terminate()
    _, err = finish(process, status=75)
    assert err == 'SIGTERM: stopped, nothing was unsaved; the same command continues\n'
    assert not any((tmp_path / 'run' / 'checkpoints').iterdir())
    assert not (tmp_path / 'run' / 'lock.json').exists()


def test_an_ignored_sighup_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with monkeypatch.context() as patch:
            signal_at(patch, 'train_batches', 1, signal.SIGHUP)
            assert loop.train(recipe(steps=2), str(tmp_path)).step == 2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_closed_terminal_saves_and_stops_the_run(tiny, tmp_path):
    """Like the end of an ssh session: SIGHUP, and a terminal that can no longer be written to."""
    ours, theirs = os.openpty()
    command = [sys.executable, str(ROOT / 'train.py'), f'--config={tiny}', f'--workdir={tmp_path}']
    streams = dict.fromkeys(('stdin', 'stdout', 'stderr'), theirs)
    process = subprocess.Popen([*command, '--config.steps=100000'], **streams, start_new_session=True)
    os.close(theirs)
    seen = b''
    while b'step 5/' not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=600) == 75
    assert saved_steps(tmp_path)[-1] >= 5

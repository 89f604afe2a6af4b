"""Signals, deaths, damaged checkpoints and full disks: what a run does, and that it continues bit for bit."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading

import chex
import orbax.checkpoint as ocp
import pytest
from fake_devices import xla_flags
from test_flags import ROOT
from test_loop import TIMING, lines, recipe, saved_state

from epsanet_jax.errors import INTERRUPTED, InputError, Interrupted, TrainingError
from epsanet_jax.training import inputs, loop

IMPORTS = 'from epsanet_jax.training.config import *\n'
TINY = """
def get_config():
    model = ModelConfig(layers=(1,), planes=(8,), kernels=(3, 5), groups=(1, 2), reduction=2, bn_group=8)
    data = DataConfig(source='synthetic', image_size=32, resize_size=32, synthetic_examples=160)
    checkpoint = CheckpointConfig(every_steps=7, every_minutes=0)
    common = {"model": model, "data": data, "checkpoint": checkpoint, "tensorboard": False}
    return Config(batch_size=16, epochs=6, log_every_steps=5, **common)
"""


def without_timing(workdir):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines(workdir)]


def assert_equal_runs(workdir, expected, step):
    chex.assert_trees_all_equal(saved_state(workdir, step), saved_state(expected, step))
    assert without_timing(workdir) == without_timing(expected)


def signal_at(monkeypatch, name, batch, number=signal.SIGTERM):
    """Makes this process get a signal when it asks for its n-th batch."""
    original = getattr(inputs, name)

    def signalling(*args):
        for i, rows in enumerate(original(*args)):
            if i == batch:
                os.kill(os.getpid(), number)
            yield rows

    monkeypatch.setattr(inputs, name, signalling)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
    loop.train(recipe(steps=8), str(workdir))
    return workdir


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_run_asked_to_stop_saves_and_continues_bit_for_bit(
    uninterrupted, tmp_path, monkeypatch, capsys, number
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
    assert_equal_runs(tmp_path, uninterrupted, 8)


def test_an_evaluation_that_is_interrupted_is_made_again(uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 'eval_batches', 3)
        with pytest.raises(Interrupted, match='stopped at step 2'):
            loop.train(recipe(steps=8), str(tmp_path))
    assert [(x['split'], x['step']) for x in lines(tmp_path)] == [('train', 2)]
    loop.train(recipe(steps=8), str(tmp_path))
    assert_equal_runs(tmp_path, uninterrupted, 8)


def test_lines_of_metrics_are_those_of_an_uninterrupted_run_at_any_step(tmp_path, monkeypatch):
    config = recipe(steps=8, eval_every_epochs=0.0, log_every_steps=6)
    loop.train(config, str(tmp_path / 'whole'))
    with monkeypatch.context() as patch:
        signal_at(patch, 'train_batches', 1)
        with pytest.raises(Interrupted):
            loop.train(config, str(tmp_path / 'cut'))
    assert not lines(tmp_path / 'cut')
    loop.train(config, str(tmp_path / 'cut'))
    assert_equal_runs(tmp_path / 'cut', tmp_path / 'whole', 8)


def damage(workdir, step):
    for path in (workdir / 'checkpoints' / str(step) / 'model').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_checkpoint_before_a_damaged_one_is_used(uninterrupted, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_at(patch, 'train_batches', 4)
        with pytest.raises(Interrupted):
            loop.train(recipe(steps=8), str(tmp_path))
    *_, before, newest = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
    damage(tmp_path, newest)
    capsys.readouterr()
    loop.train(recipe(steps=8), str(tmp_path))
    out = capsys.readouterr().out
    assert f'checkpoint {newest} is damaged and set aside' in out
    assert f'continuing at step {before}' in out
    assert (tmp_path / 'checkpoints-damaged' / str(newest)).is_dir()
    assert_equal_runs(tmp_path, uninterrupted, 8)


def test_if_all_are_damaged_nothing_is_touched(tmp_path):
    config = recipe(steps=2, eval_every_epochs=0.0)
    loop.train(config, str(tmp_path))
    damage(tmp_path, 2)
    with pytest.raises(InputError, match='no checkpoint in .* is whole; the newest, 2'):
        loop.train(recipe(steps=4, eval_every_epochs=0.0), str(tmp_path))
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['2']
    assert not (tmp_path / 'checkpoints-damaged').exists()


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp('recipe') / 'tiny.py'
    path.write_text(IMPORTS + TINY)
    return path


def start(config, workdir, *arguments, settings=(), prefix=()):
    environment = {**os.environ, 'XLA_FLAGS': xla_flags(1)}
    environment |= {'PYTHONUNBUFFERED': '1', **dict(settings)}
    command = [sys.executable, str(ROOT / 'train.py'), f'--config={config}', f'--workdir={workdir}']
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen([*prefix, *command, *arguments], cwd=ROOT, env=environment, **pipes)


def finish(process, status=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, err
    return out, err


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f'{text!r} was never said: {process.stderr.read()}')


def test_during_compilation_a_signal_ends_the_process_at_once(tiny, tmp_path):
    process = start(tiny, tmp_path / 'run')
    wait_for(process, 'compiling ...')
    process.terminate()
    _, err = finish(process, status=75)
    assert err == 'SIGTERM: stopped, nothing was unsaved; the same command continues\n'
    assert not any((tmp_path / 'run' / 'checkpoints').iterdir())


def start_without_room(kibibytes, *arguments):
    """Starts a run in which writing beyond so many KiB of a file fails, as on a full disk."""
    full = ('bash', '-c', f'ulimit -f {kibibytes}; exec "$@"', 'bash')
    return start(*arguments, settings={'JAX_ENABLE_COMPILATION_CACHE': '0'}, prefix=full)


def test_a_disk_without_room_ends_the_run_with_one_line_and_loses_nothing(tiny, tmp_path):
    arguments = ('--config.steps=7', '--config.eval_every_epochs=0')
    finish(start(tiny, tmp_path, *arguments))
    before = saved_state(tmp_path, 7)

    more = ('--config.steps=30', '--config.eval_every_epochs=0')
    process = start_without_room(16, tiny, tmp_path, *more)
    _, err = finish(process, status=1)
    assert err.startswith(f'error: cannot write a checkpoint to {tmp_path}')
    assert 'the same command continues' in err
    assert err.count('\n') == 1, err
    chex.assert_trees_all_equal(saved_state(tmp_path, 7), before)


@pytest.mark.parametrize('tensorboard', [False, True])
def test_metrics_without_room_end_the_run_with_one_line_and_it_continues(tiny, tmp_path, tensorboard):
    more = (
        '--config.steps=60',
        '--config.log_every_steps=1',
        '--config.eval_every_epochs=0',
        '--config.checkpoint.every_steps=0',
        f'--config.tensorboard={tensorboard}',
    )
    process = start_without_room(8, tiny, tmp_path / 'full', *more)
    _, err = finish(process, status=1)
    assert err.startswith(f'error: cannot write metrics to {tmp_path}')
    assert err.count('\n') == 1, err
    finish(start(tiny, tmp_path / 'full', *more))
    finish(start(tiny, tmp_path / 'whole', *more))
    assert_equal_runs(tmp_path / 'full', tmp_path / 'whole', 60)


def kill_at_random(config, workdir, kills, seed, *arguments):
    """Kills a recipe by SIGTERM or SIGKILL that many times and lets it end; returns what was sent when.

    Each time after a random number of its lines (the first is said before it compiles) and up to 0.3 s.
    """
    rng, sent = random.Random(seed), []
    while len(sent) < kills:
        process = start(config, workdir, *arguments)
        number = rng.choice([signal.SIGTERM, signal.SIGKILL])
        timer = threading.Timer(rng.uniform(0, 0.3), process.send_signal, [number])
        seen = sum(1 for _ in itertools.islice(process.stdout, rng.randrange(1, 8)))
        timer.start()
        _, err = process.communicate(timeout=600)
        timer.cancel()
        expected = INTERRUPTED if number == signal.SIGTERM else -signal.SIGKILL
        assert process.returncode == expected, f'{number.name} after {seen} lines: {err}'
        saved = max(
            (int(p.name) for p in (workdir / 'checkpoints').glob('[0-9]*') if p.name.isdigit()), default=0
        )
        sent.append((number.name, seen, saved))
    finish(start(config, workdir, *arguments))
    return sent


@pytest.mark.parametrize('kills', [2, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(tiny, tmp_path, kills):
    more = '--config.epochs=12'
    finish(start(tiny, tmp_path / 'whole', more))
    sent = kill_at_random(tiny, tmp_path / 'killed', kills, 0, more)
    assert {name for name, _, _ in sent} == {'SIGTERM', 'SIGKILL'}
    assert_equal_runs(tmp_path / 'killed', tmp_path / 'whole', 120)


@pytest.mark.faults
def test_digits_killed_20_times(tmp_path, digits_dir):
    config = ROOT / 'configs' / 'digits.py'
    arguments = (
        f'--config.data.dir={digits_dir}',
        '--config.log_every_steps=5',
        '--config.checkpoint.every_steps=5',
    )
    finish(start(config, tmp_path / 'whole', *arguments))
    sent = kill_at_random(config, tmp_path / 'killed', 20, 1, *arguments)
    last = lines(tmp_path / 'whole')[-1]['step']
    print(f'{last} steps; signal, lines seen before, step saved after: {json.dumps(sent)}')
    assert_equal_runs(tmp_path / 'killed', tmp_path / 'whole', last)


def test_a_failed_save_in_the_background_is_seen_at_the_next_step(tmp_path, monkeypatch):
    def failing(self):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(ocp.CheckpointManager, 'check_for_errors', failing)
    with pytest.raises(TrainingError, match='cannot write a checkpoint to .*No space left'):
        loop.train(recipe(), str(tmp_path))

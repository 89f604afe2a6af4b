"""Runs that are killed at random moments, lose their console or meet a full disk lose nothing."""

import itertools
import json
import random
import signal
import threading

import chex
import pytest
from runs import (
    ROOT,
    assert_equal_runs,
    finish,
    lines,
    saved_state,
    start,
    start_without_space,
)

from epsanet_jax.errors import INTERRUPTED


@pytest.mark.slow
def test_a_full_disk_for_checkpoints_ends_the_run_with_one_line_and_loses_nothing(tiny, tmp_path):
    arguments = ('--config.steps=7', '--config.eval_every_epochs=0')
    finish(start(tiny, tmp_path, *arguments))
    before = saved_state(tmp_path, 7)

    more = ('--config.steps=30', '--config.eval_every_epochs=0')
    process = start_without_space(16, tiny, tmp_path, *more)
    _, err = finish(process, status=1)
    assert err.startswith(f'error: cannot write a checkpoint to {tmp_path}')
    assert 'the same command continues' in err
    assert err.count('\n') == 1, err
    chex.assert_trees_all_equal(saved_state(tmp_path, 7), before)


SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]


def kill_at_random(config, workdir, kills, seed, *arguments):
    """Ends a run by a signal that many times, then lets it end; returns what happened when.

    Each time it waits for a random number of lines (the first is printed before compilation), closes the
    console in a third of the cases, and waits up to 0.3 s before it sends the signal.
    """
    rng, sent = random.Random(seed), []
    while len(sent) < kills:
        process = start(config, workdir, *arguments)
        number, closes = rng.choice(SIGNALS), rng.random() < 1 / 3
        timer = threading.Timer(rng.uniform(0, 0.3), process.send_signal, [number])
        seen = sum(1 for _ in itertools.islice(process.stdout, rng.randrange(1, 8)))
        if closes:
            process.stdout.close()
            process.stderr.close()
        timer.start()
        err = f'status {process.wait(timeout=600)}' if closes else process.communicate(timeout=600)[1]
        timer.cancel()
        expected = -signal.SIGKILL if number == signal.SIGKILL else INTERRUPTED
        assert process.returncode == expected, f'{number.name} after {seen} lines: {err}'
        saved = max(
            (int(p.name) for p in (workdir / 'checkpoints').glob('[0-9]*') if p.name.isdigit()), default=0
        )
        sent.append((number.name + (', no console' if closes else ''), seen, saved))
    finish(start(config, workdir, *arguments))
    return sent


@pytest.mark.slow
@pytest.mark.parametrize('kills', [2, 6])
def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(tiny, tmp_path, kills):
    more = '--config.epochs=12'
    finish(start(tiny, tmp_path / 'whole', more))
    sent = kill_at_random(tiny, tmp_path / 'killed', kills, 0, more)
    assert len({name for name, _, _ in sent}) > 1
    assert_equal_runs(tmp_path / 'killed', tmp_path / 'whole', 120)


@pytest.mark.faults
def test_digits_killed_20_times_equal_an_uninterrupted_run(tmp_path, digits_dir):
    config = ROOT / 'configs' / 'digits.py'
    arguments = (
        f'--config.data.dir={digits_dir}',
        '--config.log_every_steps=5',
        '--config.checkpoint.every_steps=5',
    )
    finish(start(config, tmp_path / 'whole', *arguments))
    sent = kill_at_random(config, tmp_path / 'killed', 20, 4, *arguments)
    names = {name for name, _, _ in sent}
    assert {s.name for s in SIGNALS} <= names
    assert {f'{s.name}, no console' for s in (signal.SIGTERM, signal.SIGHUP)} <= names
    last = lines(tmp_path / 'whole')[-1]['step']
    print(f'{last} steps; signal, lines seen before, step saved after: {json.dumps(sent)}')
    assert_equal_runs(tmp_path / 'killed', tmp_path / 'whole', last)

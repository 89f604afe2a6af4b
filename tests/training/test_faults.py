"""Runs that are killed at random moments or meet a full disk end as if nothing had happened."""

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


def kill_at_random(config, workdir, kills, seed, *arguments):
    """Kills a run by SIGTERM or SIGKILL that many times, then lets it end; returns what was sent when.

    Each time it waits for a random number of lines (the first is printed before compilation) and up to 0.3 s.
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


@pytest.mark.slow
@pytest.mark.parametrize('kills', [2, 6])
def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(tiny, tmp_path, kills):
    more = '--config.epochs=12'
    finish(start(tiny, tmp_path / 'whole', more))
    sent = kill_at_random(tiny, tmp_path / 'killed', kills, 0, more)
    assert {name for name, _, _ in sent} == {'SIGTERM', 'SIGKILL'}
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
    sent = kill_at_random(config, tmp_path / 'killed', 20, 1, *arguments)
    last = lines(tmp_path / 'whole')[-1]['step']
    print(f'{last} steps; signal, lines seen before, step saved after: {json.dumps(sent)}')
    assert_equal_runs(tmp_path / 'killed', tmp_path / 'whole', last)

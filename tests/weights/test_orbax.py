"""Orbax checkpoints of weights."""

import subprocess
import sys

import orbax.checkpoint as ocp
import pytest
import small
import torch
from command import run
from torch_files import REFERENCE, assert_refused

from epsanet_jax import InputError, load


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(REFERENCE, path)
    return path


@pytest.mark.parametrize(
    'damage',
    [
        'metadata',
        'model/d',
        *(pytest.param(f'model/{name}', marks=pytest.mark.slow) for name in ('_METADATA', 'manifest.ocdbt')),
    ],
)
def test_damaged_checkpoint_is_refused_in_one_line(capsys, saved, tmp_path, damage):
    run(capsys, 'convert', saved, tmp_path / 'orbax')
    path = tmp_path / 'orbax' / '0' / damage
    for file in path.iterdir() if path.is_dir() else [path]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    arguments = ('convert', tmp_path / 'orbax', tmp_path / 'y.pth')
    command = [sys.executable, '-m', 'epsanet_jax', *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith('error: ')
    assert process.stderr.count('\n') == 1  # no tracebacks from Orbax's threads
    assert not (tmp_path / 'y.pth').exists()
    assert_refused(capsys, *arguments, '--step', '\u00b2', part='step must')


@pytest.fixture
def run_of_two_steps(tmp_path):
    """A workdir whose checkpoints were never evaluated."""
    (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
    for step in ('1', '2'):
        (small.save(tmp_path / step) / '0').rename(tmp_path / 'run' / 'checkpoints' / step)
    return tmp_path / 'run'


def test_the_best_of_checkpoints_that_were_not_evaluated_is_an_error(capsys, run_of_two_steps):
    assert load(str(run_of_two_steps)).source.step == 2
    for path in (run_of_two_steps, run_of_two_steps / 'checkpoints'):
        with pytest.raises(InputError, match='is evaluated: choose --step=latest or a number'):
            load(str(path), 'best')
    folder = run_of_two_steps / 'checkpoints' / '1' / 'metrics'
    folder.mkdir()
    (folder / 'metrics').write_text('{"top1": 0.5}')
    assert load(str(run_of_two_steps), 'best').source.step == 1


@pytest.mark.parametrize('item', ['metadata', 'model'])
def test_a_checkpoint_that_a_run_deletes_while_it_is_read_is_replaced_by_the_next(
    run_of_two_steps, monkeypatch, item
):
    """Training deletes the newest checkpoint that was listed, and writes another one."""
    checkpoints, restore = run_of_two_steps / 'checkpoints', ocp.CheckpointManager.restore

    def late(self, step, args):
        if step == 2 and item in args:
            (checkpoints / '2').rename(checkpoints / '3')
        return restore(self, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, 'restore', late)
    assert load(str(run_of_two_steps)).source.step == 3
    with pytest.raises(InputError, match='no checkpoint of step 2'):
        load(str(run_of_two_steps), '2')

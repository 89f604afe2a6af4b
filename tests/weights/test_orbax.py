"""Orbax checkpoints of weights."""

import subprocess
import sys

import pytest
import torch
from command import run
from torch_files import REFERENCE, assert_refused


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

"""The command `epsanet`: usage, help, exit status."""

import subprocess
import sys

import pytest
from command import run

from epsanet_jax.commands.main import COMMANDS
from epsanet_jax.errors import INTERRUPTED, Interrupted


@pytest.mark.parametrize(
    ('arguments', 'part'),
    [
        ((), 'COMMAND'),
        (('sumary', 'x'), 'sumary'),
        (('summary',), 'NAME'),
        (('summary', 'epsanet50_smal'), "did you mean 'epsanet50_small'"),
        (('summary', 'resnet50', '--image-size', '8'), 'at least 32, got 8'),
        (('summary', 'resnet50', '--num-classes', 'ten'), "expected a positive integer, got 'ten'"),
        (('evaluate', '/no/such/run'), 'no such checkpoint: /no/such/run'),
        (('evaluate', __file__), 'is no PyTorch or safetensors file: it starts with'),
        (('evaluate', 'tests'), 'no checkpoint in'),
    ],
)
def test_wrong_usage_and_input_give_one_line_and_status_2(capsys, arguments, part):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, '')
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    assert part in err


@pytest.mark.parametrize('command', [module.__name__.split('.')[-1] for module in COMMANDS])
def test_help_of_every_command_has_an_example(capsys, command):
    status, out, _ = run(capsys, command, '--help')
    assert status == 0
    assert f'example: epsanet {command} ' in out


def test_interrupted_command_ends_with_status_75(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise Interrupted('stopped: run the command again')

    monkeypatch.setattr('epsanet_jax.data.prepare.dataset.prepare', interrupted)
    status, out, err = run(capsys, 'prepare', 'src', 'dst')
    assert (status, out, err) == (INTERRUPTED, '', 'stopped: run the command again\n')


def test_closed_pipe_is_not_an_error():
    process = subprocess.run(
        f'{sys.executable} -m epsanet_jax summary resnet50 | head -n 1; exit ${{PIPESTATUS[0]}}',
        shell=True,
        executable='/bin/bash',
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, '')
    assert process.stdout.startswith('resnet50')

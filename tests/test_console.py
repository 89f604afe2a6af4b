"""A console that is closed, full or gone; tests/training/test_flags.py has that of train.py."""

import sys

import pytest
from command import shell

from epsanet_jax.console import Console, ReaderGone
from epsanet_jax.errors import InputError

COMMAND = f'{sys.executable} -m epsanet_jax'


@pytest.mark.parametrize('arguments', ['summary resnet50', '--help'])
def test_a_result_that_nobody_reads_is_no_error_but_one_that_is_lost_is(arguments):
    done = shell(f'{COMMAND} {arguments} | true; exit ${{PIPESTATUS[0]}}')
    assert (done.returncode, done.stderr) == (0, '')
    done = shell(f'{COMMAND} {arguments} >/dev/full')
    expected = 'error: cannot write to stdout: No space left on device\n'
    assert (done.returncode, done.stderr) == (2, expected)


def test_a_result_for_a_closed_stdout_is_an_error():
    done = shell(f'{COMMAND} summary resnet50 >&-')
    assert (done.returncode, done.stderr.count('\n'), 'stdout is closed' in done.stderr) == (2, 1, True)
    assert shell(f'{COMMAND} summary resnet50 2>&-').returncode == 0


def test_a_command_that_writes_files_needs_no_stdout(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"split": "train", "step": 1, "loss": 2.0, "lr": 1}\n')
    done = shell(f'{COMMAND} plot {tmp_path} >/dev/full')
    assert (done.returncode, done.stderr.count('\n')) == (0, 1)
    assert (tmp_path / 'curves.png').stat().st_size > 0


def test_streams_that_are_not_those_of_the_process_stay_as_they_are(capsys):
    before = sys.stdout, sys.stderr
    with Console():
        assert (sys.stdout, sys.stderr) == before
        print('x')
    assert capsys.readouterr().out == 'x\n'


def test_loss_is_raised_only_if_stdout_is_the_result():
    console = Console()
    console.lost(2, OSError(28, 'full'))
    console.is_result = True
    console.lost(2, OSError(28, 'full'))
    with pytest.raises(ReaderGone):
        console.lost(1, BrokenPipeError(32, 'gone'))
    with pytest.raises(InputError, match='cannot write to stdout: full'):
        console.lost(1, OSError(28, 'full'))

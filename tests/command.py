"""The command `epsanet`, called in this process; commands in a shell."""

import os
import subprocess

from runs import ROOT

from epsanet_jax.commands.main import main


def run(capsys, *arguments):
    """Returns exit status, stdout and stderr."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as e:
        status = e.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def shell(line, **settings):
    """Runs a line of bash in the repository."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', **settings}
    return subprocess.run(
        ['bash', '-c', line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )

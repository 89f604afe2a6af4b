"""The command `epsanet`, called in this process."""

from epsanet_jax.commands.main import main


def run(capsys, *arguments):
    """Returns exit status, stdout and stderr."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as e:
        status = e.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err

"""The command `epsanet`. Exit status 0; 2 with one line for wrong usage or input; 75 if interrupted."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from epsanet_jax.commands import convert, evaluate, explain, export, plan, plot, predict, prepare, summary
from epsanet_jax.console import Console, ReaderGone
from epsanet_jax.data.decode import ignore_pillow_warnings
from epsanet_jax.errors import INTERRUPTED, InputError, Interrupted, one_line

COMMANDS = (summary, evaluate, predict, explain, convert, export, plan, prepare, plot)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        argv: arguments without the name of the program; None: those of this process.
    """
    with Console() as console:
        console.is_result = True  # --help
        try:
            return _run(argv, console)
        except InputError as e:
            print(f'error: {one_line(e, limit=None)}', file=sys.stderr)
            return 2
        except Interrupted as e:
            print(one_line(e), file=sys.stderr)
            return INTERRUPTED
        except ReaderGone:
            return 0
        except KeyboardInterrupt:  # commands that have something to save raise Interrupted instead
            return 130


def _run(argv: Sequence[str] | None, console: Console) -> int:
    parser = _Parser(prog='epsanet', description='EPSANet for JAX.')
    parser.set_defaults(writes_files=False)
    subcommands = parser.add_subparsers(required=True, metavar='COMMAND')
    for command in COMMANDS:
        command.add_parser(subcommands)
    try:
        args, rest = parser.parse_known_args(argv)
    except SystemExit:
        sys.stdout.flush()  # the help
        raise
    if 'config_fields' in args:
        args.config_fields = [argument for argument in rest if argument.startswith('--config.')]
        rest = [argument for argument in rest if argument not in args.config_fields]
    if rest:
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
    console.is_result = not args.writes_files
    if console.is_result:
        console.check()
    ignore_pillow_warnings()
    status = args.run(args) or 0
    sys.stdout.flush()
    return status


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f'error: {message} (see {self.prog} --help)\n')

"""`epsanet plot`: draws the curves of runs."""

import argparse
import os
from typing import Any

from epsanet_jax.commands.common import add_overwrite


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'plot',
        help='draw the curves of runs',
        description='Draws loss, top-1 accuracy and learning rate of one or several runs over their steps.',
        epilog='example: epsanet plot runs/a runs/b --out curves.png',
    )
    parser.add_argument('workdirs', nargs='+', metavar='WORKDIR')
    out = '.png, .svg or .pdf (default: curves.png in the first workdir, which is replaced)'
    parser.add_argument('--out', metavar='FILE', help=out)
    add_overwrite(parser)
    parser.set_defaults(run=run, writes_files=True)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from epsanet_jax.analysis import plot
    from epsanet_jax.paths import check_free, is_remote

    folder = '' if is_remote(args.workdirs[0]) else args.workdirs[0]
    out = os.path.expanduser(args.out or os.path.join(folder, 'curves.png'))
    if args.out:
        check_free([out], args.overwrite, '--out')
    for line in plot.plot(args.workdirs, out):
        print(line)
    print(f'written: {out}')

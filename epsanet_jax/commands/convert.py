"""`epsanet convert`: weights from and to PyTorch."""

import argparse
from typing import Any

from epsanet_jax.commands.common import add_choice_of_weights, positive


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'convert',
        help='weights from and to PyTorch',
        description='Converts weights between PyTorch files, safetensors and checkpoints of epsanet_jax. '
        'The names of SRC and DST decide what they are: .pth.tar (as the reference saves it), .pth and .pt '
        '(a bare state dict), .safetensors; anything else is a folder: a workdir or a checkpoint.',
        epilog='example: epsanet convert checkpoint.pth.tar weights.safetensors --verify',
    )
    parser.add_argument('src', metavar='SRC')
    parser.add_argument('dst', metavar='DST')
    parser.add_argument('--model', metavar='NAME', help='default: found from the shapes')
    parser.add_argument(
        '--num-classes', type=positive, metavar='N', help='replace a classifier of another size by a new one'
    )
    add_choice_of_weights(parser)
    parser.add_argument('--verify', action='store_true', help='compare logits with those of PyTorch')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from epsanet_jax.weights.save import convert

    lines = convert(
        args.src, args.dst, args.model, args.num_classes, args.step, args.verify, ema=not args.no_ema
    )
    for line in lines:
        print(line)

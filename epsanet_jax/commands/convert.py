"""`epsanet convert`: converts weights from and to PyTorch."""

import argparse
from typing import Any

from epsanet_jax.commands.common import add_choice_of_weights, add_overwrite, positive, report_on


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'convert',
        help='convert weights from and to PyTorch',
        description='Converts weights between PyTorch files, safetensors and checkpoints of epsanet_jax. '
        'The names of SRC and DST select the format: .pth.tar (a checkpoint of the reference), .pth or .pt '
        '(a state dict), .safetensors; any other name is a folder: a workdir or a checkpoint.',
        epilog='example: epsanet convert checkpoint.pth.tar weights.safetensors --verify',
    )
    parser.add_argument('src', metavar='SRC')
    parser.add_argument('dst', metavar='DST')
    parser.add_argument('--model', metavar='NAME', help='default: inferred from the shapes')
    text = 'replace a classifier of another size with a new one'
    parser.add_argument('--num-classes', type=positive, metavar='N', help=text)
    add_choice_of_weights(parser)
    parser.add_argument('--verify', action='store_true', help="compare the logits with PyTorch's")
    add_overwrite(parser)
    parser.set_defaults(run=run, writes_files=True)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from epsanet_jax.weights.save import convert

    options = (args.model, args.num_classes, args.step, args.verify, not args.no_ema)
    more = {'overwrite': args.overwrite, 'ignore': args.ignore, 'report': report_on(args.src)}
    for line in convert(args.src, args.dst, *options, **more):
        print(line)

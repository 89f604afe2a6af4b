"""`epsanet evaluate`: accuracy of a checkpoint."""

import argparse
import json
from typing import Any

from epsanet_jax.commands.common import add_checkpoint, positive, to_stderr, use_persistent_cache


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'evaluate',
        help='accuracy of a checkpoint',
        description='Evaluates a checkpoint on every image of a dataset, each exactly once.',
        epilog='example: epsanet evaluate runs/digits --data digits --split test',
    )
    add_checkpoint(parser)
    parser.add_argument(
        '--data', metavar='DIR_OR_NAME', help="an image folder or a TFDS dataset (default: the run's own)"
    )
    parser.add_argument('--split', help="folder or TFDS split (default: the run's own, else val or test)")
    parser.add_argument('--data-dir', metavar='DIR', help='folder that holds TFDS datasets')
    parser.add_argument('--batch-size', type=positive, default=64, metavar='N')
    parser.add_argument(
        '--on-bad', choices=('stop', 'skip'), default='stop', help='at an image that cannot be decoded'
    )
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from epsanet_jax.training.evaluation import evaluate
    from epsanet_jax.training.report import describe
    from epsanet_jax.weights import load

    use_persistent_cache()
    network = load(args.checkpoint, args.step, ema=not args.no_ema)
    means = evaluate(
        network, args.data, args.split, args.data_dir, args.batch_size, args.on_bad, report=to_stderr
    )
    source = network.source
    if args.json:
        about = {'checkpoint': args.checkpoint, 'step': source.step, 'averaged': source.averaged}
        print(json.dumps({**about, **means}))
    else:
        averaged = ', moving averages' if source.averaged else ''
        print(f'step {source.step}{averaged}, {describe(means)}')

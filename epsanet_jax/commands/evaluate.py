"""`epsanet evaluate`: evaluates a checkpoint."""

import argparse
import json
from typing import Any

from epsanet_jax.commands import common


def add_parser(subcommands: Any) -> None:
    """Adds the command's parser."""
    parser = subcommands.add_parser(
        'evaluate',
        help='loss and accuracy of a checkpoint',
        description='Computes loss and accuracy of a checkpoint on a dataset, with each image exactly once.',
        epilog='example: epsanet evaluate runs/digits --data digits --split test',
    )
    common.add_checkpoint(parser)
    text = "folder or file of images, or TFDS dataset (default: the run's)"
    parser.add_argument('--data', metavar='PATH_OR_NAME', help=text)
    parser.add_argument('--split', help="folder or TFDS split (default: the run's, else val or test)")
    parser.add_argument('--data-dir', metavar='DIR', help='folder that holds TFDS datasets')
    common.add_label_column(parser)
    common.add_batch_size(parser, 64)
    common.add_on_bad(parser)
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from epsanet_jax.training.evaluation import evaluate
    from epsanet_jax.training.report import describe

    common.use_persistent_cache()
    network = common.load_network(args)
    dataset = (args.data, args.split, args.data_dir)
    options = (args.batch_size, args.on_bad, common.to_stderr, args.label_column)
    means = evaluate(network, *dataset, *options)
    source = network.source
    if args.json:
        about = {'checkpoint': args.checkpoint, 'step': source.step, 'averaged': source.averaged}
        print(json.dumps({**about, **means}))
    else:
        averaged = ', moving averages' if source.averaged else ''
        print(f'step {source.step}{averaged}, {describe(means)}')
